"""What a bundle loses against float32, and the statistics that keep it small."""
