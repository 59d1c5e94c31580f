"""Chat templates: conversations -> text, and which parts of the text are trained on."""
