"""The fourth world: SmolLM2-135M, a VLM and a reasoning model made from it, and every way to bring them together."""
