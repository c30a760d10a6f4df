"""``python -m validation run``: a user's own card, measured part by part and reported as this project's cards are."""
