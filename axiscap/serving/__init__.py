"""Capping inside serving engines.

A server has three kinds of process, and each kind has a folder: ``front`` (it talks to clients), the scheduler
(``scheduler``, one file) and ``worker`` (it runs the model). ``settings`` is the operator's configuration, ``request``
what a request carries through all of them, ``registry`` which content is in which slot, and ``shared_folder`` where the
processes of one machine exchange files. ``vllm`` and ``sglang`` connect these parts to an engine; ``axiscap_plugin``,
outside the package, starts them. ``client`` talks to a server from outside.
"""
