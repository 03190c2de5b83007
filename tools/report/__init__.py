"""What a report of tools/evaluate.py is made of: figures, pictures, and the page that shows them."""
