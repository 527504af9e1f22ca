"""The laboratory: small paired trainings that test what the papers claim, with the controls that could refute it.

A study (`hypermoe.py`, `damoe.py`) names arms, which are changes of one config, and comparisons between arms. `lab.py`
trains every arm with every seed, `measures.py` reads what came out, `findings.py` compares, `page.py` writes the
report.
"""
