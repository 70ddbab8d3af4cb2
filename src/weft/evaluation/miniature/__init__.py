"""The papers' tables in miniature: whether their claims hold in the drawn world with the tiny generalist.

arms.py       what is trained: one row each, and how much of it a budget pays for
claims.py     what the papers say, as contrasts of arms
aspects.py    what an answer is worth, by what the exact reader sees in it
alphabets.py  what pictures are made of: codes of single patches, codes with a receptive field, vectors
tuning.py     steps that go on where they were stopped
jobs.py       one alphabet or one run of an arm, from nothing to a JSON file
verdicts.py   contrast -> estimate, interval, verdict
run.py        all jobs on several processes, then the report
page.py       the report
"""
