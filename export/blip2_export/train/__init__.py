"""The two stages of BLIP-2, and the small vision and language models that the demo freezes before them."""
