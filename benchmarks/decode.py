"""Pictures written code by code, beside transformers' own generation.    python -m benchmarks.decode [--quick]

Random-weight Janus and Emu3 stacks of middle size, float32, greedy; both sides share the weights. transformers writes
one prompt at a time, as its users do: Janus' `generate(generation_mode="image")` with guidance 5, which it cannot do
without, and Emu3's `generate` with `prefix_allowed_tokens_fn`, without guidance. Our engine has room for one request
(b1), or for eight prompts of different lengths at once (b8). All codes are compared before anything is timed; then the
sides take turns, each from the prompts' ids to the last code. Pixels are made by neither.

The last line is JSON, our picture tokens per second over theirs: medians over rounds. Every figure's quartiles, the
share of a step that is spent outside the decoder stack, the time of the stack's matrix products alone, and what
adapters of rank 64 cost in a wider stack (not with `--quick`) go to `--out FILE`.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
)

from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import emu3, janus
from weft.backbones.base import Backbone, Elements, encode_document
from weft.document import Document, user
from weft.generation import Engine, SamplingConfig, slots_for
from weft.ops.packed_linear import Packs

TEXT = "a small boat with a red sail leaves the harbour at dawn"
PROMPTS = [Document((user(TEXT[:length]),)) for length in (1, 7, 12, 19, 26, 38, 46, 54)]
ANSWER = SamplingConfig(first="image", max_images=1, max_text_tokens=0)


@dataclass(frozen=True)
class Size:
    width: int
    hidden: int
    layers: int
    heads: int
    side: int
    """Codes per row and column of a picture."""
    rounds: int
    alone: int
    """Of so many prompts the codes are compared alone too, of all in the batch."""


WIDE = Size(2048, 5632, 4, 16, side=8, rounds=6, alone=0)
FULL = Size(512, 1408, 8, 8, side=16, rounds=4, alone=len(PROMPTS))
QUICK = Size(512, 1408, 8, 8, side=12, rounds=3, alone=2)


@dataclass
class Pair:
    """One stack, read by both sides."""

    backbone: Any
    config: SamplingConfig
    theirs: Callable[[Tensor], Tensor]
    """(L,) ids of a prompt -> (P,) element ids of its picture, line ends among them."""


def janus_pair(size: Size) -> Pair:
    tokenizer = janus.nano().tokenizer
    pixels = 8  # of one code; its codec is as small as it can be, and not used
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": size.width,
            "intermediate_size": size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads, "max_position_embeddings": 512,
            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": size.side * pixels,
            "patch_size": pixels, "mlp_ratio": 2.0, "projection_dim": size.width, "num_image_tokens": size.side**2,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 4096, "latent_channels": 8, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "projection_dim": size.width,
            "image_token_embed_dim": size.width,
        },
        image_token_id=tokenizer.get_vocab_size() - 1,
        tie_word_embeddings=False,
    )  # fmt: skip
    untouched = copy.deepcopy(config)  # a backbone may choose its own attention
    torch.manual_seed(0)
    backbone = janus.JanusBackbone(config, tokenizer, "janus", janus.Reading())
    loud(backbone, backbone.head, backbone.code_head.vision_head)
    nn.init.normal_(backbone.code_table.weight)
    reference = JanusForConditionalGeneration(untouched)
    share(backbone, reference, {ours: theirs for theirs, ours in janus.PARTS.items()})
    tokens = backbone.tokens
    how = GenerationConfig(
        bos_token_id=tokens.begin, pad_token_id=tokens.pad, eos_token_id=tokens.end, do_sample=False,
        guidance_scale=5, generation_kwargs={"boi_token_id": tokens.begin_image},
    )  # fmt: skip

    def theirs(prompt: Tensor) -> Tensor:
        ids = torch.cat((prompt, torch.tensor([tokens.begin_image])))[None]
        codes = reference.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", generation_config=how
        )
        return codes[0] + backbone.vocabulary

    return Pair(backbone, ANSWER, theirs)


def emu3_pair(size: Size) -> Pair:
    from tokenizers import Tokenizer

    codes = 2048
    tokenizer = Tokenizer.from_str(emu3._nano_tokenizer_json(codes))
    ids = tokenizer.get_vocab()
    config = Emu3Config(
        text_config={
            # as in the release, the head is about a tenth of the stack, and most of its rows are no codes
            "vocab_size": 9216, "hidden_size": size.width, "intermediate_size": size.hidden,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 4,
            "max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "bos_token_id": ids[emu3.BEGIN], "eos_token_id": ids[emu3.END], "pad_token_id": ids[emu3.PAD],
        },
        vq_config={
            "codebook_size": codes, "base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32,
            "num_res_blocks": 1, "attn_resolutions": [1],
        },
        vocabulary_map=ids,
    )  # fmt: skip
    untouched = copy.deepcopy(config)  # a backbone may choose its own attention
    torch.manual_seed(0)
    backbone = emu3.Emu3Backbone(config, tokenizer, "emu3", emu3.Pixels(smallest=16, largest=4096))
    loud(backbone, backbone.head)
    backbone.use_area((size.side * backbone.factor) ** 2)
    reference = Emu3ForConditionalGeneration(untouched)
    share(backbone, reference, {ours: theirs for theirs, ours in reversed(emu3.KEYS)})
    form, tokens = backbone.form, backbone.tokens
    line_end = torch.tensor([form.line_end])
    visual = backbone.code_rows  # a tensor, where a list would cost them the more
    how = GenerationConfig(
        bos_token_id=tokens.begin, pad_token_id=tokens.pad, eos_token_id=tokens.end, do_sample=False,
        max_new_tokens=form.patches,
    )  # fmt: skip

    def theirs(prompt: Tensor) -> Tensor:
        ids = torch.cat((prompt, torch.tensor(form.before)))[None]
        start = ids.shape[1]

        def allowed(_: int, written: Tensor) -> Tensor:
            return line_end if form.forced(len(written) - start) is not None else visual

        made = reference.generate(
            ids, attention_mask=torch.ones_like(ids), prefix_allowed_tokens_fn=allowed, generation_config=how
        )
        elements = made[0, start : start + form.patches]
        return torch.where(elements == form.line_end, elements, elements - visual[0] + backbone.vocabulary)

    return Pair(backbone, ANSWER.model_copy(update={"guidance": 1.0}), theirs)


def loud(backbone: nn.Module, *heads: nn.Module) -> None:
    """Weights so large that every layer and position matters, and that no greedy picture is one code throughout."""
    decoder: Any = backbone.decoder
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.2 * parameter.shape[1] ** -0.5)
    for head in heads:
        nn.init.normal_(head.weight, std=0.3)  # type: ignore[arg-type]
    backbone.requires_grad_(False).eval()


def share(backbone: nn.Module, reference: nn.Module, names: dict[str, str]) -> None:
    """Give transformers' whole model our tensors; a key too many or too few raises."""
    tensors = {}
    for key, tensor in backbone.state_dict().items():
        ours = next(prefix for prefix in names if key.startswith(prefix))
        tensors[names[ours] + key.removeprefix(ours)] = tensor
    reference.load_state_dict(tensors, assign=True)
    reference.requires_grad_(False).eval()


class Watched:
    """A backbone whose pictures stay codes. `stack`: seconds spent inside its decoder stack; `last`: when the newest
    picture had its codes, and `stack` then."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self.stack = backbone, 0.0
        self.last = (0.0, 0.0)
        self.pictures: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def forward(self, *args: Any) -> Tensor:
        start = time.perf_counter()
        hidden = self._backbone.forward(*args)
        self.stack += time.perf_counter() - start
        return hidden

    def decode_image(self, elements: Elements, options: Any) -> PILImage.Image:
        self.last = (time.perf_counter(), self.stack)
        self.pictures.append(elements.ids)
        return PILImage.new("RGB", (1, 1))


@dataclass(frozen=True)
class Sample:
    speed: float
    """Picture tokens per second, line ends among them."""
    outside: float = 0.0
    """Share of the time that was not spent in the decoder stack."""


class Ours:
    """An engine with room for so many requests, kept for all runs as a server keeps it."""

    def __init__(self, backbone: Backbone, config: SamplingConfig, requests: int) -> None:
        self.backbone, self.config = Watched(backbone), config
        slots = requests * slots_for(backbone, config)
        self.engine = Engine(self.backbone, slots=slots)  # type: ignore[arg-type]

    def write(self, prompts: list[Document]) -> list[Tensor]:
        """(P,) element ids of each picture; all prompts have pictures of one form and so end in their order."""
        self.backbone.pictures.clear()
        for prompt in prompts:
            self.engine.submit(prompt, self.config)
        for _ in self.engine.run():
            pass
        return list(self.backbone.pictures)

    def time(self, prompts: list[Document]) -> Sample:
        self.backbone.stack = 0.0
        start = time.perf_counter()
        tokens = sum(map(len, self.write(prompts)))
        end, stack = self.backbone.last
        return Sample(tokens / (end - start), 1 - stack / (end - start))


def check(name: str, pair: Pair, one: Ours, many: Ours, alone: int) -> dict[str, int]:
    """Codes of every prompt: transformers', ours alone, ours all at once."""
    together, different = many.write(PROMPTS), set()
    for i, prompt in enumerate(PROMPTS):
        wanted = pair.theirs(encode_document(pair.backbone, prompt, answer=True).ids)
        by_us = {"in the batch": together[i]}
        if i < alone:
            by_us["alone"] = one.write([prompt])[0]
        for where, found in by_us.items():
            if not torch.equal(found, wanted):
                at = int((found != wanted).nonzero()[0])
                raise SystemExit(f"{name}, prompt {i} {where}: other codes from place {at} on; nothing was timed")
        different.add(tuple(wanted.tolist()))
    return {"pictures": len(different), "codes": len({code for picture in different for code in picture})}


def race(pair: Pair, one: Ours, many: Ours, rounds: int) -> dict[str, list[Sample]]:
    """Each round one prompt by either side and all eight by the engine, in turning order."""

    def theirs(prompt: Document) -> Sample:
        ids = encode_document(pair.backbone, prompt, answer=True).ids
        start = time.perf_counter()
        tokens = len(pair.theirs(ids))
        return Sample(tokens / (time.perf_counter() - start))

    samples: dict[str, list[Sample]] = {"theirs": [], "b1": [], "b8": []}
    for turn in range(rounds):
        prompt = PROMPTS[turn * 3 % len(PROMPTS)]
        arms: dict[str, Callable[[], Sample]] = {
            "theirs": lambda p=prompt: theirs(p),
            "b1": lambda p=prompt: one.time([p]),
            "b8": lambda: many.time(PROMPTS),
        }
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            gc.collect()
            samples[name].append(arms[name]())
    return samples


def adapted(backbone: Any, kind: str) -> Any:
    """A second backbone over the same weights, with adapters of rank 64 attached."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
    memo[id(backbone.tokenizer)] = backbone.tokenizer
    model = copy.deepcopy(backbone, memo)
    attach(model, AdapterConfig.model_validate({"kind": kind, "rank": 64}))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.01, generator=generator)
    model.eval()
    return model


def adapters(size: Size) -> dict[str, Any]:
    """Time of a picture token with one adapter over that with another, or with none, on a stack as wide as that of
    `benchmarks.adapters`, whose picture tokens of the same ranks and batches these figures stand beside."""
    pair, found = janus_pair(size), {}
    models = {"none": pair.backbone, **{kind: adapted(pair.backbone, kind) for kind in ("lora", "moss")}}
    for requests in (1, len(PROMPTS)):
        arms = {name: Ours(model, pair.config, requests) for name, model in models.items()}
        speeds: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(size.rounds + 1):
            for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
                speeds[name].append(arms[name].time(PROMPTS[-requests:]).speed)
        for one, other in (("moss", "lora"), ("lora", "none"), ("moss", "none")):
            pairs = list(zip(speeds[other], speeds[one], strict=True))[1:]  # the first fills caches
            found[f"b{requests}_{one}_over_{other}"] = summary([slower / faster for slower, faster in pairs])
    return found


@torch.no_grad()
def products(backbone: Any, rows: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds of the stack's matrix products alone, by rows: what a step cannot take less than. Weights as they
    are, and packed as the engine has them from four rows on."""
    linears = [module for module in backbone.decoder.modules() if isinstance(module, nn.Linear)]
    found = {}
    for count in rows:
        inputs = {width: torch.randn(count, 1, width) for width in {linear.in_features for linear in linears}}
        for name, packs in (("", nullcontext), ("_packed", Packs([backbone.decoder], count).in_use)):
            times = []
            for _ in range(22):
                with packs():
                    start = time.perf_counter()
                    for linear in linears:
                        linear(inputs[linear.in_features])
                    times.append(1000 * (time.perf_counter() - start))
            found[f"rows_{count}{name}"] = summary(times[2:])["median"]
    return found


def summary(values: list[float]) -> dict[str, float]:
    low, middle, high = (round(value, 4) for value in statistics.quantiles(values, n=4))
    return {"median": middle, "q1": low, "q3": high, "n": len(values)}


def measure(name: str, pair: Pair, size: Size) -> dict[str, Any]:
    one, many = (Ours(pair.backbone, pair.config, requests) for requests in (1, len(PROMPTS)))
    checked = check(name, pair, one, many, size.alone)
    samples = race(pair, one, many, size.rounds)
    slots = slots_for(pair.backbone, pair.config)
    found: dict[str, Any] = {"checked": checked, "products_ms": products(pair.backbone, (slots, 8 * slots))}
    for arm, of_one in samples.items():
        found[f"{arm}_tokens_per_second"] = summary([sample.speed for sample in of_one])
    for arm in ("b1", "b8"):
        pairs = zip(samples[arm], samples["theirs"], strict=True)
        found[arm] = summary([mine.speed / theirs.speed for mine, theirs in pairs])
        found[f"{arm}_outside_stack"] = summary([sample.outside for sample in samples[arm]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller pictures, fewer rounds, no adapters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    parser.add_argument("--only", choices=["janus", "emu3", "adapters"], help="for tuning: one part")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    makers = {"janus": janus_pair, "emu3": emu3_pair}
    results: dict[str, Any] = {}
    for name, make in makers.items():
        if args.only in (None, name):
            pair = make(size)
            results[name] = measure(name, pair, size)
            del pair
    table = Table("", "theirs /s", "ours b1 /s", "ours b8 /s", "b1", "b8", "outside b1", "outside b8")
    for name, found in results.items():
        speeds = (f"{found[f'{arm}_tokens_per_second']['median']:.1f}" for arm in ("theirs", "b1", "b8"))
        ratios = (f"{found[key]['median']:.2f}" for key in ("b1", "b8", "b1_outside_stack", "b8_outside_stack"))
        table.add_row(name, *speeds, *ratios)
    console = Console()
    console.print(table)
    attached = {}
    if not args.quick and args.only in (None, "adapters"):
        attached = adapters(WIDE)
        costs = Table("a picture token with adapters of rank 64", "ratio")
        for figure, cost in attached.items():
            costs.add_row(figure.replace("_", " "), f"{cost['median']:.3f} ({cost['q1']:.3f} to {cost['q3']:.3f})")
        console.print(costs)
    if args.out:
        header = {"size": asdict(size), "threads": args.threads, "torch": torch.__version__}
        wide = {"adapters": {"size": asdict(WIDE), **attached}} if attached else {}
        args.out.write_text(json.dumps({**header, **results, **wide}, indent=2) + "\n")
    print(
        json.dumps({f"{name}_{arm}": found[arm]["median"] for name, found in results.items() for arm in ("b1", "b8")})
    )


if __name__ == "__main__":
    main()
