"""Arithmetic and bytes: native modules, each with a pure Python twin. Knows no asyncio, config or logging."""
