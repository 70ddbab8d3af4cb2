"""Train `weft/tiny` on single skills, never on stories.

    python -m pretraining.base --codec DIR --tokenizer DIR --out DIR

    draw   caption -> picture              tell   picture -> caption
    edit   picture, sentence -> picture    again  picture -> the same picture
    say    text -> the same text, also a list of sentences, also across a picture
    copy   random tokens -> the same tokens   line  a sentence by itself

Three phases, about 3 CPU hours together (the commands are in pretraining/README.md). Held-out scenes (`is_held_out`)
are never shown. Progress is judged by free running, because the loss is no guide to it. Writes the folder that
`weft.backbones.tiny` reads, and `log.jsonl`.
"""

import argparse
import functools
import json
import math
import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F

from weft.backbones.tiny import TinyBackbone, TinyConfig, save
from weft.data.sources.picturebook import Scene, draw, is_held_out, random_edit, random_scene, random_story
from weft.layout import ImageSpan, TextSpan, lay_out

ROWS, LENGTH = 8, 384
SHARES = {
    "first": {"draw": 30, "tell": 18, "edit": 30, "again": 4, "say": 10, "copy": 6, "line": 2},
    # copying text comes late and needs more of it; telling was learnt long before
    "second": {"draw": 26, "tell": 10, "edit": 32, "again": 4, "say": 16, "copy": 10, "line": 2},
    # what is left to learn is which of two things an edit means
    "third": {"draw": 22, "tell": 8, "edit": 53, "again": 2, "say": 8, "copy": 5, "line": 2},
}
"""Documents of each kind, in percent, by phase."""
GREEDY_CHECK = 64


class Documents:
    """An endless stream of (ids, spans, first answer position)."""

    def __init__(self, model: TinyBackbone, rng: random.Random, shares: dict[str, int]) -> None:
        self.model, self.rng, self.shares = model, rng, shares

        @functools.lru_cache(maxsize=200_000)
        def codes(scene: Scene) -> tuple[int, ...]:
            return tuple(model.encode_images([draw(scene)])[0].tolist())

        self.codes = codes

    def scene(self) -> Scene:
        while True:
            scene = random_scene(self.rng)
            if not is_held_out(scene):
                return scene

    def edit(self) -> tuple[Scene, str, Scene]:
        while True:
            before = self.scene()
            sentence, after = random_edit(self.rng, before)
            if not is_held_out(after):
                return before, sentence, after

    def next(self):
        kind = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
        rng = self.rng
        if kind == "draw":
            scene = self.scene()
            return self.build([] if rng.random() < 0.08 else [scene.caption()], [scene])
        if kind == "tell":
            scene = self.scene()
            return self.build([scene], [scene.caption()])
        if kind == "edit":
            before, sentence, after = self.edit()
            return self.build([before, sentence], [after])
        if kind == "again":
            scene = self.scene()
            return self.build([scene, "again."], [scene])
        if kind == "say":
            story = random_story(rng, edits=rng.randint(1, 4))
            parts = [story.scenes[0].caption(), *story.sentences()]
            rng.shuffle(parts)
            between = [self.scene() for _ in range(rng.choice((0, 0, 0, 1, 2)))]
            if rng.random() < 0.3:
                return self.build([f"say: {parts[0]}", *between], [parts[0]])
            parts = parts[: rng.randint(2, 4)]
            return self.build(["say each: " + ", then ".join(p[:-1] for p in parts) + ".", *between], [" ".join(parts)])
        if kind == "line":
            story = random_story(rng)
            return self.build([], [rng.choice([story.instruction(), *story.sentences(), story.scenes[1].caption()])])
        count = rng.randint(3, 40)
        some = [rng.randrange(6, self.model.config.vocabulary) for _ in range(count)]
        return self.build([some], [some])

    def build(self, prompt, answer):
        tokens = self.model.tokens
        ids, spans, rows_cols = [tokens.begin], [1], self.model.grid

        def add(part):
            if isinstance(part, Scene):
                ids.extend((tokens.begin_image, *self.codes(part), tokens.end_image))
                spans.append(1)
                spans.append(ImageSpan(*rows_cols))
                spans.append(1)
            else:
                new = part if isinstance(part, list) else self.model.tokenize(part)
                ids.extend(new)
                spans.append(len(new))

        for part in prompt:
            add(part)
        ids.append(tokens.separator)
        spans.append(1)
        first = len(ids)
        for part in answer:
            add(part)
        ids.append(tokens.end)
        spans.append(1)
        return ids, [TextSpan(s) if isinstance(s, int) else s for s in spans], first

    def batch(self):
        """Rows packed from whole documents: ids (B, L), layout, labels (B, L) with -100 where nothing is learnt."""
        ids = torch.full((ROWS, LENGTH), self.model.tokens.pad)
        labels = torch.full((ROWS, LENGTH), -100)
        spans = []
        for row in range(ROWS):
            at, packed = 0, []
            while True:
                new, kinds, first = self.next()
                if at + len(new) > LENGTH:
                    break
                ids[row, at : at + len(new)] = torch.tensor(new)
                labels[row, at + first : at + len(new)] = torch.tensor(new[first:])
                packed += kinds
                at += len(new)
            spans.append(packed)
        return ids, lay_out(spans, length=LENGTH), labels


@torch.no_grad()
def free_running(model: TinyBackbone, prompts: list[list], docs: Documents) -> list[list[int]]:
    """Greedy answers, prompts of one length at a time; knows nothing of the engine."""
    from transformers import DynamicCache

    answers: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    built = []
    for i, prompt in enumerate(prompts):
        ids, spans, first = docs.build(prompt, [])
        built.append((ids[:first], spans[:-1]))
        by_length.setdefault(first, []).append(i)
    tokens, patches = model.tokens, model.grid[0] * model.grid[1]
    for members in by_length.values():
        ids = torch.tensor([built[i][0] for i in members])
        cache = DynamicCache()
        layout = lay_out([built[i][1] for i in members])
        hidden = model.decoder(
            inputs_embeds=model.embed(ids, layout), past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1:]
        left = [-1] * len(members)  # patches still to be drawn, or -1 in text
        done = [False] * len(members)
        for _ in range(100):
            text, image = model.text_logits(hidden)[:, 0], model.image_logits(hidden)[:, 0]
            step = []
            for j, i in enumerate(members):
                if done[j]:
                    token = tokens.pad
                elif left[j] > 0:
                    token = int(image[j].argmax())
                elif left[j] == 0:
                    token = tokens.end_image
                else:
                    token = int(text[j].argmax())
                if not done[j]:
                    answers[i].append(token)
                    if token == tokens.begin_image:
                        left[j] = patches
                    elif left[j] >= 0:
                        left[j] -= 1
                    done[j] = token == tokens.end
                step.append(token)
            if all(done):
                break
            place_in = [patches - left[j] - 1 if 0 <= left[j] < patches else -1 for j in range(len(members))]
            place_out = [patches - left[j] if 0 < left[j] <= patches else -1 for j in range(len(members))]
            embeds = model.table(torch.tensor(step))
            for places, table in ((place_in, model.place_in), (place_out, model.place_out)):
                place = torch.tensor(places)
                embeds = embeds + table(place.clamp_min(0)) * (place >= 0).unsqueeze(-1)
            hidden = model.decoder(
                inputs_embeds=embeds[:, None], past_key_values=cache, use_cache=True
            ).last_hidden_state
    return answers


def check(model: TinyBackbone, docs: Documents, reader, seed: int = 12345) -> dict:
    """Free-running exactness on `GREEDY_CHECK` tasks of each kind; drawing and telling on held-out scenes."""
    rng = random.Random(seed)
    model.eval()
    held = [s for s in (random_scene(rng) for _ in range(40 * GREEDY_CHECK)) if is_held_out(s)][:GREEDY_CHECK]
    edits = [(s, *random_edit(rng, s)) for s in (random_scene(rng) for _ in range(GREEDY_CHECK))]
    stories = [random_story(rng, edits=2) for _ in range(GREEDY_CHECK)]
    vocabulary = model.config.vocabulary

    def picture_of(answer):
        codes = [token for token in answer if token >= vocabulary]
        return (
            reader.read(model.decode_image(torch.tensor(codes)))
            if len(codes) == model.grid[0] * model.grid[1]
            else None
        )

    def share(pairs):
        pairs = list(pairs)
        return round(sum(a == b for a, b in pairs) / len(pairs), 3)

    drawn = free_running(model, [[s.caption()] for s in held], docs)
    told = free_running(model, [[s] for s in held], docs)
    edited = free_running(model, [[before, sentence] for before, sentence, _ in edits], docs)
    lists = [[s.scenes[0].caption(), *s.edits] for s in stories]
    said = free_running(model, [["say each: " + ", then ".join(p[:-1] for p in parts) + "."] for parts in lists], docs)
    return {
        "draw": share(zip(map(picture_of, drawn), held, strict=True)),
        "tell": share((model.detokenize(a), s.caption()) for a, s in zip(told, held, strict=True)),
        "edit": share(zip(map(picture_of, edited), [after for *_, after in edits], strict=True)),
        "say": share((model.detokenize(a), " ".join(p)) for a, p in zip(said, lists, strict=True)),
    }


def main() -> None:
    from weft.data.sources.picturebook import Reader

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="plan the schedule to end after this wall time")
    parser.add_argument("--phase", choices=SHARES, default="first")
    parser.add_argument("--init", type=Path, help="folder of the phase before")
    parser.add_argument("--text-weight", type=float, default=1.0, help="of a text token's loss; a patch's is 1")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    model = TinyBackbone(TinyConfig(tokenizer.get_vocab_size()), tokenizer, "tiny")
    for parameter in model.decoder.parameters():
        if parameter.dim() == 2 and min(parameter.shape) > 4:
            torch.nn.init.normal_(parameter, std=0.02)
    model.codec.load_state_dict(load_file(args.codec / "codec.safetensors"))
    model.codec.requires_grad_(False)
    if args.init:
        model.load_state_dict(load_file(args.init / "model.safetensors"))
    docs, reader = Documents(model, random.Random(args.seed), SHARES[args.phase]), Reader()
    trained = [p for name, p in model.named_parameters() if not name.startswith("codec.")]
    matrices = [p for p in trained if p.dim() == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.05},
            {"params": [p for p in trained if p.dim() != 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.97),
    )
    print(json.dumps({"parameters": sum(p.numel() for p in trained)}), flush=True)
    log, start = [], time.time()
    sums = {"text": [0.0, 0], "image": [0.0, 0]}
    step = 0
    while True:
        done = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if done >= 1:
            break
        rate = args.rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        ids, layout, labels = docs.batch()
        hidden = model.decoder(inputs_embeds=model.embed(ids, layout), use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        keep = targets != -100
        losses = F.cross_entropy(model.head(hidden[:, :-1][keep]), targets[keep], reduction="none")
        is_code = targets[keep] >= model.config.vocabulary
        weight = torch.where(is_code, 1.0, args.text_weight)
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        for name, chosen in (("text", ~is_code), ("image", is_code)):
            sums[name][0] += losses.detach()[chosen].sum().item()
            sums[name][1] += int(chosen.sum())
        if step % 100 == 0:
            row = {
                "step": step,
                "rate": round(rate, 6),
                "seconds": round(time.time() - start, 1),
                **{f"{name}_loss": round(total / max(1, n), 4) for name, (total, n) in sums.items()},
            }
            sums = {"text": [0.0, 0], "image": [0.0, 0]}
            if step % 500 == 0:
                row |= check(model, docs, reader)
                save(model, args.out)
            log.append(row)
            print(json.dumps(row), flush=True)
            (args.out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    model.eval()
    log.append({"step": step, "seconds": round(time.time() - start, 1), **check(model, docs, reader)})
    print(json.dumps(log[-1]), flush=True)
    (args.out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    save(model, args.out)


if __name__ == "__main__":
    main()
