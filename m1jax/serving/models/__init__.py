"""The package that SGLANG_EXTERNAL_MODEL_PACKAGE names: every module in it with an `EntryClass` is served."""
