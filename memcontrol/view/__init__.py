"""Owns what people see: tables, the live display, the report, the model card."""
