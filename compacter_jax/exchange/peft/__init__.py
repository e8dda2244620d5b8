"""Folders of PEFT: import and export."""

from compacter_jax.exchange.peft.folder import CONFIG_NAME, export_peft, import_peft

__all__ = ["CONFIG_NAME", "export_peft", "import_peft"]
