"""The ``ffpretrain`` command. Verbs live one to a module and are imported when they are called."""
