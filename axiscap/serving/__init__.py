"""Capping inside serving engines. What they share:

``settings`` is the operator's word, and the rule by which a request gets a profile; ``control`` applies it to requests
and changes profiles; ``buffers`` are what a capped graph reads and writes; ``worker`` says whose rows a step computes;
``telemetry`` counts what it did, ``state`` is where one server's processes meet, and ``metrics`` is the page. ``vllm``
(with ``kv``, blocks that leave it) and ``sglang`` are what is each engine's own, ``vllm_norm`` and ``sglang_norm`` how
the norm behind a capped layer takes the cap in; ``axiscap_plugin``, outside the package, puts them in place.
"""
