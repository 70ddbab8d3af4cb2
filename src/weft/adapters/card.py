"""The part of a model card that PEFT's template leaves open: how to load the adapter."""

from pathlib import Path

from weft.atomic import write_text

PLACEHOLDER = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""Of PEFT's template."""

LOADING = """This adapter has a branch for text and one for pictures. PEFT loads it where Weft is installed; every call
says what its positions are:

```python
import weft.adapters  # tells PEFT this type of adapter
from peft import PeftModel
from weft.layout import layout_of_tokens

model = PeftModel.from_pretrained(base_model, "this-folder")
layout = layout_of_tokens(ids, begin_image=BEGIN_IMAGE_ID, grid=(ROWS, COLS))
logits = model(input_ids=ids, layout=layout).logits
```"""


def complete_card(folder: Path) -> None:
    """Say in `README.md` how the adapter is loaded, where there is a card that still leaves it open."""
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else ""
    if PLACEHOLDER in text:
        write_text(card, text.replace(PLACEHOLDER, LOADING))
