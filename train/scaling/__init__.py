"""Loss against compute: a grid of small runs, and the power laws through them."""
