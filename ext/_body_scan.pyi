from ext._body_scan_py import read_answer as read_answer
