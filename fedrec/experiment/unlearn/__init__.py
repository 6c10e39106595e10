"""`fedrec unlearn`: one experiment from its configuration to the report.

``experiment`` runs it: ``settings`` and ``setup`` check what was asked for, ``strategy`` takes one strategy through all
requests, ``golds`` makes what it is compared with, ``place`` and ``stores`` hold its state, ``evidence`` and ``verify``
are about the audit log. What people look at: ``table``, ``plots``, ``report``, all from ``record``.
"""
