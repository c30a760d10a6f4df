"""``kvsim report`` and ``kvsim serve``: one question (:mod:`~kvsim.output.page.question`) under four tabs.

*plan* (:mod:`~kvsim.output.page.plan`), *one deployment*, *break-even* and *the cache explained* each answer it by the
code of a command; :mod:`~kvsim.output.page.document` puts them together, :mod:`~kvsim.output.page.form` asks.
"""
