"""How good a trained model is: samples on disk, their statistics, and systems side by side."""
