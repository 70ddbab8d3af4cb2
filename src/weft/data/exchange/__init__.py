"""Documents for others, and from them: one file a form, one row each."""

from weft.data.exchange import chat_jsonl, huggingface, llama_factory, llava, swift, webdataset
from weft.data.exchange.form import Form
from weft.errors import UsageError

FORMS: dict[str, Form] = {
    "chat_jsonl": chat_jsonl.FORM,
    "huggingface": huggingface.FORM,
    "llama_factory": llama_factory.FORM,
    "llava": llava.FORM,
    "swift": swift.FORM,
    "webdataset": webdataset.FORM,
}


def form_called(name: str) -> Form:
    """Raises `UsageError` if there is none of that name."""
    if name not in FORMS:
        raise UsageError(f"no form is called {name!r}", fix=f"choose one of {', '.join(FORMS)}")
    return FORMS[name]
