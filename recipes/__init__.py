"""Layer to format, with reasons: the recipes that come with Tessera."""
