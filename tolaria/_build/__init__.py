"""How the extension is built: the one account of sources, flags and toolkits, for setup.py and ``tolaria build``.

Nothing here imports torch, setuptools or a compiler's answer before it is called, so that the loader
(``tolaria/_extension.py``) can read build infos and find cached builds at no cost.
"""
