"""The methods: ``table.py`` lists them, ``functions.py`` says what each file defines, the other files are methods."""
