"""The methods: ``table.py`` lists them, ``functions.py`` defines their interface, the other files implement it."""
