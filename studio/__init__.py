"""A page in the browser for the project's commands: photos, training, generating, comparing, exporting."""
