"""The two files that an export carries where no architecture of transformers is exactly the model.

They are copied as they are and run without p828: transformers imports them from the export (`trust_remote_code`). So
they import one another relatively, and transformers at their top; nothing in p828 imports them.
"""
