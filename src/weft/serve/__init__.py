"""One engine behind an OpenAI-compatible server and a page.

limits.py      every limit, in one object
scheduler.py   requests of many people, one thread that steps the engines; owns every request from arrival to outcome
prompt.py      the three shapes of a prompt -> a document
responses.py chat.py images.py    events -> the three shapes of an answer, whole or streamed
files.py       pictures that are fetched by address
guard.py       who may ask, how often, and how much
app.py         the addresses; nothing but wiring
run.py         a server from its settings to its end
page.py        the page at `/`; door.py lets people in, conversation.py holds what they said, gallery.py has examples
ray_serve.py   the same on several machines
"""
