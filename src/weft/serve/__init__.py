"""One engine behind an OpenAI-compatible server and a page.

limits.py      every limit, in one object; settings.py has what else a server is told
scheduler.py   requests of many people; owns each from its arrival to its outcome
worker.py      the models: engines stepped in turns, lines and batches; messages.py is what the two tell each other
hosts.py       where models work: a thread, or with models_process.py, wire.py and models_main.py a process of their own
prompt.py      the three shapes of a prompt -> a document
responses.py chat.py images.py    events -> the three shapes of an answer, whole or streamed
files.py       pictures that are fetched by address
guard.py       who may ask, how often, and how much
app.py         the addresses; nothing but wiring
run.py         a server from its start to its end
page.py        the page at `/`; door.py lets people in, conversation.py holds what they said, gallery.py has examples
ray_serve.py   the same on several machines
"""
