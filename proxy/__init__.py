"""chat-proxy: a browser chat page talks to a paid language model without ever holding its API key."""

__version__ = "0.1.0"
