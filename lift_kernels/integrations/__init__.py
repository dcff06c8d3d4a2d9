"""Bridges to transformers and peft.

Each module is imported only by those who use it: ``integrations.transformers``,
``integrations.peft``.
"""
