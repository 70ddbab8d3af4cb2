"""The text branch as an ordinary LoRA folder of PEFT, for programs that do not know Weft.

On text the outputs are those of the adapted model up to fp32 rounding: PEFT scales after the up-projection, we before.
Pictures get the text branch there, because plain LoRA knows one branch.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.adapters.config import Branch, MossConfig
from weft.adapters.merge import adapted_layers
from weft.atomic import write_folder
from weft.errors import AdapterError

_PREFIX = "base_model.model."
"""Of the names in a folder that PEFT writes."""


def export_text_lora(model: PeftModel, folder: Path, adapter: str = "default") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` of type LORA, whole or not at all.

    Modules to save go along. A folder that is there is replaced.

    Raises:
        AdapterError: no layer has a text branch, or one has a full update, which is no product of two factors.
    """
    layers = adapted_layers(model, adapter)
    branches = {name: layer.moss_branches[adapter].text for name, layer in layers.items()}
    texts = {name: branch for name, branch in branches.items() if branch is not None}
    if not texts:
        raise AdapterError(f"adapter {adapter!r} has no text branch to export", fix="keep it attached")
    full = next((name for name, branch in texts.items() if branch.rank == "full"), None)
    if full is not None:
        raise AdapterError(
            "the text branch is a full update, which no LoRA of a lower rank equals",
            where=full,
            fix="merge it instead: merge_text(model)",
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items():
        if "moss_text_" in key:
            key = key.replace("moss_text_A", "lora_A.weight").replace("moss_text_B", "lora_B.weight")
        elif "moss_" in key:
            continue
        tensors[key] = tensor.detach().cpu().contiguous()
    config = lora_config(cast(MossConfig, model.peft_config[adapter]), texts, model.get_base_model())
    with write_folder(folder) as staging:
        (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, staging / "adapter_model.safetensors", metadata={"format": "pt"})


def lora_config(config: MossConfig, texts: dict[str, Branch], base: nn.Module) -> dict[str, Any]:
    """What PEFT's LoRA must be told so that every layer gets its own rank and scale.

    Args:
        texts: the branch of each layer, by its name in `base`.
    """
    rooted = all(branch.scaling == "sqrt_rank" for branch in texts.values())
    settings = {name: (cast(int, b.rank), b.alpha if rooted else _alpha(b)) for name, b in texts.items()}
    (rank, alpha), _ = Counter(settings.values()).most_common(1)[0]
    values = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # annotated so, but only ever divided
        use_rslora=rooted,
        rank_pattern={_exactly(name): r for name, (r, _) in settings.items() if r != rank},
        alpha_pattern={_exactly(name): a for name, (_, a) in settings.items() if a != alpha},
        lora_dropout=next(iter(texts.values())).dropout,
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type,
        inference_mode=True,
    ).to_dict()
    return values | {"target_modules": _targets(texts, base)}


def _alpha(branch: Branch) -> float:
    """What divided by the rank is the branch's scale."""
    return branch.alpha if branch.scaling == "rank" else branch.scale * cast(int, branch.rank)


def _exactly(name: str) -> str:
    """A pattern that PEFT matches with this layer alone: it also accepts what ends in one."""
    return f"^{re.escape(name)}"


def _targets(texts: dict[str, Branch], base: nn.Module) -> list[str] | str:
    """Last names, where they mean these layers and no others; otherwise an expression of whole names."""
    leaves = {name.rpartition(".")[2] for name in texts}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if meant == texts.keys() else "|".join(re.escape(name) for name in sorted(texts))
