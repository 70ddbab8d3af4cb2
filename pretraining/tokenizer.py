"""Train the tokenizer of `weft/tiny`: byte-level BPE in which every word of the picturebook is one token.

    python -m pretraining.tokenizer --out DIR

The remaining merges come from the Python language reference that ships with every interpreter, so ordinary English is
shorter than its bytes.
"""

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from weft.backbones.tiny import SPECIAL
from weft.data.sources.picturebook import random_story


def picturebook_lines(count: int) -> list[str]:
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        story = random_story(rng, edits=6)
        lines += [story.instruction(), *story.sentences(), *(scene.caption() for scene in story.scenes)]
    return lines + ["say: again. say each:"] * count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=768)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    english = [
        line.strip() for topic in sorted(topics) for line in topics[topic].splitlines() if line.strip()[:1].isalpha()
    ]
    tokenizer.train_from_iterator((f" {line}" for line in picturebook_lines(30_000) + english), trainer)
    split = {
        w
        for line in picturebook_lines(200)
        for w in line.replace(".", " .").replace(",", " ,").replace(":", " :").split()
    }
    pieces = {word: tokenizer.encode(f" {word}").tokens for word in sorted(split) if word.isalpha()}
    print({word: tokens for word, tokens in pieces.items() if len(tokens) > 1} or "every picturebook word is one token")
    tokenizer.save(str(args.out / "tokenizer.json"))


if __name__ == "__main__":
    main()
