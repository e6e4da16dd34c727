"""What each model keeps in high precision, with reasons: the architectures that Tessera knows."""
