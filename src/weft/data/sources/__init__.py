"""Where documents come from: one file each, one row each. Importing this draws in parsers, not torch."""

from typing import Annotated, Any

from pydantic import Field

from weft.data.sources import (
    ade20k,
    auto,
    chat_jsonl,
    comm,
    elements,
    embedded,
    flintstones,
    folder,
    instruct_pix2pix,
    interleavedbench,
    laion,
    llava,
    magicbrush,
    mantis,
    mapping,
    mmc4,
    mmdialog,
    obelics,
    omnicorpus,
    pair_shards,
    picturebook_source,
    pororo,
    swift,
    vision_flan,
    vist,
    wikiweb2m,
    youcook2,
)
from weft.data.sources.base import Source

SOURCES: dict[str, Source[Any]] = {
    "ade20k": ade20k.SOURCE,
    "auto": auto.SOURCE,
    "chat_jsonl": chat_jsonl.SOURCE,
    "comm": comm.SOURCE,
    "elements": elements.SOURCE,
    "embedded": embedded.SOURCE,
    "flintstones": flintstones.SOURCE,
    "folder": folder.SOURCE,
    "instruct_pix2pix": instruct_pix2pix.SOURCE,
    "interleavedbench": interleavedbench.SOURCE,
    "laion": laion.SOURCE,
    "llava": llava.SOURCE,
    "magicbrush": magicbrush.SOURCE,
    "mantis": mantis.SOURCE,
    "mapping": mapping.SOURCE,
    "mmc4": mmc4.SOURCE,
    "mmdialog": mmdialog.SOURCE,
    "obelics": obelics.SOURCE,
    "omnicorpus": omnicorpus.SOURCE,
    "pair_shards": pair_shards.SOURCE,
    "picturebook": picturebook_source.SOURCE,
    "pororo": pororo.SOURCE,
    "swift": swift.SOURCE,
    "vision_flan": vision_flan.SOURCE,
    "vist": vist.SOURCE,
    "wikiweb2m": wikiweb2m.SOURCE,
    "youcook2": youcook2.SOURCE,
}

SourceConfig = Annotated[
    ade20k.Ade20k
    | auto.Auto
    | chat_jsonl.ChatJsonl
    | comm.Comm
    | elements.Elements
    | embedded.Embedded
    | flintstones.Flintstones
    | folder.Folder
    | instruct_pix2pix.InstructPix2Pix
    | interleavedbench.InterleavedBench
    | laion.Laion
    | llava.Llava
    | magicbrush.MagicBrush
    | mantis.Mantis
    | mapping.Mapping
    | mmc4.Mmc4
    | mmdialog.MMDialog
    | obelics.Obelics
    | omnicorpus.OmniCorpus
    | pair_shards.PairShards
    | picturebook_source.Picturebook
    | pororo.Pororo
    | swift.Swift
    | vision_flan.VisionFlan
    | vist.Vist
    | wikiweb2m.WikiWeb2M
    | youcook2.YouCook2,
    Field(discriminator="kind"),
]
