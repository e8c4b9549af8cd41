"""The tests; a package, so that a rank's process imports a test module under the name it has here."""
