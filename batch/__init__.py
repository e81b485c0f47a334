"""``hart-batch``: a file of prompts to pictures and a table, in one process or on Ray."""
