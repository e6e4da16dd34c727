"""The pack's version, as pyproject.toml and CHANGELOG.md state it; a test holds them together."""

VERSION = "0.5.1"
