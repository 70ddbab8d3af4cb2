"""`weft models` and what it tells: the table of released models, the memory they need, what a folder holds."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weft import cli
from weft.adapters import AdapterConfig, adapter_parameters, attach
from weft.backbones import catalogue, family_of
from weft.backbones.catalogue import KNOWN, PRECISIONS, by_name

FAMILIES = ("tiny", "chameleon", "janus", "emu3", "emu2", "mm_interleaved")


@pytest.fixture(autouse=True)
def wide(monkeypatch, tmp_path):
    monkeypatch.setitem(cli.VERBS, "models", ("weft.cli.models:app", "Released models and checkpoints."))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["models", *map(str, arguments)])
    return caught.value.code or 0


def examine(folder):
    return catalogue.examine(folder, family_of(folder) or "tiny")


def random_model(family):
    """The family's instant model, and its module."""
    module = importlib.import_module(f"weft.backbones.{family}")
    return (module.load("nano") if family == "tiny" else module.nano()), module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> folder of its instant model."""
    folders = {}
    for family in FAMILIES:
        model, module = random_model(family)
        folders[family] = tmp_path_factory.mktemp(family)
        module.save(model, folders[family])
    return folders


# --- the table --------------------------------------------------------------------------------------------------------


def released(known):
    """The released configuration as transformers builds it, without memory."""
    import transformers as hf

    shape = known.shape
    sizes = {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "intermediate_size": shape.mlp,
             "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
             "vocab_size": shape.vocabulary}  # fmt: skip
    with torch.device("meta"):
        if known.family == "chameleon":
            config = hf.ChameleonConfig(**sizes, vocabulary_map={"<image>": 8711})
            return hf.ChameleonForConditionalGeneration(config)
        if known.family == "emu3":
            return hf.Emu3ForConditionalGeneration(hf.Emu3Config(text_config=sizes, vocabulary_map={}))
        if known.family == "janus":
            width = shape.hidden
            config = hf.JanusConfig(
                text_config={"model_type": "llama", "tie_word_embeddings": False, **sizes},
                vision_config={"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                               "image_size": 384, "patch_size": 16, "projection_dim": width},
                vq_config={"projection_dim": width, "image_token_embed_dim": width},
                tie_word_embeddings=False,
            )  # fmt: skip
            return hf.JanusForConditionalGeneration(config)
        if known.family == "mm_interleaved":
            from weft.backbones.mm_interleaved import MMInterleavedBackbone, files
            from weft.backbones.tokenizer import byte_tokenizer

            return MMInterleavedBackbone(files.shipped("full"), byte_tokenizer(), "released")
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=False))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_the_sizes_of_a_row_are_those_of_the_released_architecture(known):
    model = released(known)
    own = getattr(model, "decoder", None) or model.model
    inner = vars(own)["_modules"]
    stack = inner.get("language_model") or inner.get("text_model") or own
    layers = [p for p in stack.layers.modules() if isinstance(p, nn.Linear)]
    assert sum(layer.weight.numel() for layer in layers) == catalogue.linear_parameters(known.shape)
    total = sum({id(p): p.numel() for p in model.parameters()}.values())
    if known.family == "emu2":
        # EVA: 64 blocks of 4 x 1792^2 + 2 x 1792 x 15360; U-Net and autoencoder of SDXL: 2.53e9 + 0.08e9
        total += 64 * (4 * 1792**2 + 2 * 1792 * 15360) + (2_610_000_000 if known.pixels else 0)
    assert known.parameters == pytest.approx(total, rel=0.01)


def test_names_are_found_in_any_case_and_are_unique():
    assert len({known.name.lower() for known in KNOWN}) == len(KNOWN)
    assert by_name("baai/EMU3-gen-hf").family == "emu3" and by_name("baai/emu3-gen") is None
    assert {known.family for known in KNOWN} == set(FAMILIES) - {"tiny"}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formulas_give_the_bytes_of_a_real_model(family, saved):
    model, _ = random_model(family)
    found = examine(saved[family])
    shape, parameters = found.shape, found.parameters
    layers = [part for part in model.decoder.modules() if isinstance(part, nn.Linear)]
    assert catalogue.linear_parameters(shape) == sum(layer.weight.numel() for layer in layers)
    stored = [tensor for _, tensor in model.state_dict().items()]
    assert catalogue.weight_bytes(parameters, shape, "bf16") == sum(t.bfloat16().nbytes for t in stored)
    attach(model, AdapterConfig(kind="moss", rank=4))
    assert catalogue.adapter_parameters(shape, 4) == sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_has_the_bytes_of_the_formula(family, saved):
    from transformers import DynamicCache

    model, _ = random_model(family)
    decoder, positions = model.decoder.bfloat16(), 7
    shape = examine(saved[family]).shape
    cache = DynamicCache()
    embeds = torch.zeros(1, positions, shape.hidden, dtype=torch.bfloat16)
    if model.synchronizer is not None:
        model.synchronizer.insertion.set_without_pictures()
    decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == catalogue.cache_bytes(shape, positions)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_fewer_bits_take_less_memory_and_training_more_than_running(known):
    run, train = (
        [needed(known.parameters, known.shape, known.context, precision) for precision in PRECISIONS]
        for needed in (catalogue.run_bytes, catalogue.train_bytes)
    )
    assert run == sorted(run, reverse=True) and train == sorted(train, reverse=True)
    assert all(more > less for more, less in zip(train, run, strict=True))
    assert run[0] > 2 * known.parameters
    other = [known.parameters - catalogue.linear_parameters(known.shape)] * 2
    assert run[2] > sum(other) + catalogue.linear_parameters(known.shape) / 2


def test_a_longer_context_than_is_reckoned_with_costs_no_more():
    shape = KNOWN[0].shape
    assert catalogue.cache_bytes(shape, 10**6) == catalogue.cache_bytes(shape, catalogue.LONGEST)
    assert catalogue.train_bytes(1, shape, 10**6, "bf16") == catalogue.train_bytes(1, shape, catalogue.LONGEST, "bf16")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_says_what_it_is(family, saved):
    found = examine(saved[family])
    model, _ = random_model(family)
    assert found.family == family
    assert found.context == model.context_length and found.pixels
    assert found.shape.hidden == model.embed(torch.zeros(1, 1, dtype=torch.int64), layout(1)).shape[-1]
    assert found.bytes == sum(path.stat().st_size for path in saved[family].rglob("*.safetensors")) - headers(found)


def layout(length):
    from weft.layout import TextSpan, lay_out

    return lay_out([[TextSpan(length)]])


def headers(found) -> int:
    files = {info.file for part in found.parts.values() for info in part.tensors.values()}
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def test_the_pixel_decoder_may_be_missing_or_in_a_folder_of_its_own(saved, tmp_path):
    folder = Path(shutil.copytree(saved["chameleon"], tmp_path / "c"))
    weights = load_file(folder / "model.safetensors")
    vq = {k.removeprefix("model.vqmodel."): t for k, t in weights.items() if k.startswith("model.vqmodel.")}
    kept = {k: t for k, t in weights.items() if not k.startswith("model.vqmodel.decoder.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors")
    assert not examine(folder).pixels
    from weft.backbones.chameleon import VQ_FOLDER

    (folder / VQ_FOLDER).mkdir()
    save_file(vq, folder / VQ_FOLDER / "model.safetensors")
    (folder / VQ_FOLDER / "config.json").write_text("{}")
    assert examine(folder).pixels


def test_old_conversions_and_the_makers_own_layouts_are_told_apart(saved, tmp_path):
    folder = Path(shutil.copytree(saved["chameleon"], tmp_path / "c"))
    weights = load_file(folder / "model.safetensors")
    weights = {
        key: tensor[0].clone() if "_norm." in key and "self_attn" in key else tensor for key, tensor in weights.items()
    }
    save_file(weights, folder / "model.safetensors")
    assert "old conversion" in examine(folder).layout
    folder = Path(shutil.copytree(saved["janus"], tmp_path / "j"))
    config = json.loads((folder / "config.json").read_text())
    config = {
        "model_type": "multi_modality",
        "language_config": {"num_hidden_layers": 2, "max_position_embeddings": 99},
    }
    (folder / "config.json").write_text(json.dumps(config))
    found = examine(folder)
    assert found.family == "janus" and found.layout == "the makers' own" and found.context == 99
    assert found.shape == replace(catalogue.DEFAULTS["janus"][0], layers=2)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_list_fits_and_names_every_model(capsys):
    assert run() == 0
    short = capsys.readouterr().out
    assert run("list") == 0
    assert capsys.readouterr().out == short
    assert all(len(line) <= 110 for line in short.splitlines())
    table = short[: short.index("pictures: as many")]
    assert all(len(line.rstrip()) <= 100 for line in table.splitlines())
    assert all(known.name in short for known in KNOWN)
    assert "research only" in short and "check it yourself" in short and "non-commercial" in short


def test_programs_get_every_fact(capsys):
    assert run("list", "--json") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in models] == [known.name for known in KNOWN]
    anole = models[0]
    assert anole["pictures"] == 3 and anole["licence"].startswith("research only") and anole["shape"]["layers"] == 32
    # 7.1 B in 2 bytes, and keys and values of 4096 positions
    assert anole["memory_bytes"]["run"]["bf16"] == 2 * 7_082_000_000 + 2 * 32 * 4096 * 4096 * 2


def test_one_model_is_shown_by_name_without_torch():
    script = (
        "import sys; from weft import cli; cli.VERBS['models'] = ('weft.cli.models:app', '')\n"
        "try: cli.main(['models', *sys.argv[1:]])\n"
        "finally: print('torch' in sys.modules)"
    )
    for arguments in (["show", "deepseek-community/Janus-Pro-7B"], ["--help"], ["list"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False", done.stderr
    assert "DeepSeek model licence" in subprocess.run(
        [sys.executable, "-c", script, "show", "deepseek-community/Janus-Pro-7B"], capture_output=True, text=True
    ).stdout.replace("\n", " ").replace("  ", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_is_shown(family, saved, capsys):
    assert run("show", saved[family], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == family and facts["pixels"] and facts["dtypes"].keys() <= {"float32", "int64"}
    assert facts["tensors"] == sum(len(load_file(path)) for path in saved[family].rglob("*.safetensors"))
    assert facts["fingerprint"] == examine(saved[family]).main.fingerprint and facts["revision"] is None
    assert run("show", saved[family]) == 0
    assert facts["fingerprint"] in capsys.readouterr().out


def test_the_revision_of_a_cached_model_is_shown(saved, tmp_path, capsys):
    folder = tmp_path / "models--o--n" / "snapshots" / "0f357a65"
    shutil.copytree(saved["chameleon"], folder)
    assert run("show", folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["revision"] == "0f357a65"


def test_the_bundled_model_is_shown(capsys):
    assert run("show", "weft/tiny") == 0
    assert "Weft's own" in capsys.readouterr().out


def test_showing_what_is_not_there_names_what_is_near(capsys):
    assert run("show", "Janus-Pro-7b") == 2
    assert "did you mean deepseek-community/Janus-Pro-7B?" in capsys.readouterr().err
    assert run("show", "qqqqqq") == 2
    assert "`weft models` lists them" in capsys.readouterr().err


def test_a_configuration_that_describes_no_such_model_is_named(saved, tmp_path, capsys):
    for family, config in (
        ("tiny", '{"codec": {}, "width": 3}'),
        ("janus", '{"model_type": "janus", "text_config": 3}'),
    ):
        folder = Path(shutil.copytree(saved[family], tmp_path / family))
        (folder / "config.json").write_text(config)
        assert run("show", folder) == 1
        assert f"does not describe a model of the family {family}" in capsys.readouterr().err


def test_a_truncated_folder_is_named(saved, tmp_path, capsys):
    folder = Path(shutil.copytree(saved["emu3"], tmp_path / "e"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run("show", folder) == 1
    error = capsys.readouterr().err
    assert "cut off" in error and str(weights) in error


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def converters(monkeypatch):
    """What would be converted by whom."""
    from weft.backbones import emu2, meta, mm_interleaved
    from weft.backbones.mm_interleaved import files

    calls = []
    # what it finds in real releases is tested with them; these pickles are empty
    monkeypatch.setattr(files, "is_release", lambda source: str(source) == "m")
    monkeypatch.setattr(mm_interleaved, "convert", lambda source, out: calls.append(("mm_interleaved", source, out)))
    monkeypatch.setattr(meta, "convert", lambda source, out: calls.append(("meta", source, out)))
    monkeypatch.setattr(emu2, "convert", lambda source, out: calls.append(("emu2", source, out)))
    return calls


@pytest.mark.parametrize(
    "files, source, converter, given",
    [
        (["r/models/7b/consolidated.pth", "r/tokenizer/vqgan.ckpt"], "r", "meta", "r"),
        (["r/models/30b/consolidated.00.pth", "r/tokenizer/vqgan.ckpt"], "r", "meta", "r"),
        (["r/models/7b/consolidated.pth"], "r/models/7b/consolidated.pth", "meta", "r/models/7b"),
        (["e/Emu2_pytorch_model.bin"], "e", "emu2", "e"),
        (["e/pytorch_model-00001-of-00002.bin", "e/config.json"], "e", "emu2", "e"),
        (["e/emu2.pt"], "e/emu2.pt", "emu2", "e/emu2.pt"),
        (["m/pytorch_model-00001-of-00002.bin", "m/pytorch_model.bin.index.json"], "m", "mm_interleaved", "m"),
    ],
)
def test_what_the_folder_holds_decides_who_converts(converters, files, source, converter, given):
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert run("convert", source, "out") == 0
    assert converters == [(converter, Path(given), Path("out"))]


def test_what_cannot_be_converted_is_refused(converters, saved, capsys):
    assert run("convert", "GAIR/Anole-7b-v0.1", "out") == 2
    assert "hf download GAIR/Anole-7b-v0.1 --local-dir SRC" in capsys.readouterr().err
    assert run("convert", saved["janus"], "out") == 2
    assert "loaded as they are" in capsys.readouterr().err
    Path("empty").mkdir()
    assert run("convert", "empty", "out") == 2
    assert ".pth" in capsys.readouterr().err
    Path("full").mkdir()
    Path("full/x").touch()
    assert run("convert", saved["janus"], "full") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert converters == []


@pytest.mark.parametrize("name", ["consolidated.pth", "emu2.bin"])
def test_a_damaged_pickle_leaves_nothing_behind(name, capsys):
    Path("source/models/7b").mkdir(parents=True)
    Path("source/models/7b", name).write_bytes(b"not a pickle")
    assert run("convert", "source", "out") in (1, 2)
    assert not Path("out").exists() and not list(Path().glob(".out*"))
