"""``hart-serve``: bundles behind the images API that people's clients speak, and a page to draw on."""
