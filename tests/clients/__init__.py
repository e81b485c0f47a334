"""Scripts that are run with other versions of OpenAI's client, each in an environment of its own."""
