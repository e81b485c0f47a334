"""``python -m tests.handbook`` writes the pages of docs/ that are made from the code."""

from tests.handbook.pages import PAGES

for file, text in PAGES.items():
    file.write_text(text, encoding="utf-8")
    print(file)
