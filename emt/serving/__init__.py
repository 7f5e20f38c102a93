"""The server: `emt serve` answers the OpenAI API from one model with one memory.

It needs the extra `serve`. `emt.serving.app.create_app` makes the application.
"""
