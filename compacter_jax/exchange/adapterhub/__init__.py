"""Folders of AdapterHub's library `adapters`: import and export."""

from compacter_jax.exchange.adapterhub.exporting import export_adapterhub
from compacter_jax.exchange.adapterhub.heads import HEAD_CONFIG_NAME, read_adapterhub_head
from compacter_jax.exchange.adapterhub.importing import import_adapterhub

__all__ = ["HEAD_CONFIG_NAME", "export_adapterhub", "import_adapterhub", "read_adapterhub_head"]
