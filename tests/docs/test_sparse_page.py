"""The code blocks of docs/sparse.md, run against a real service."""

from tests.docs import test_readme as pages

PAGE = "docs/sparse.md"


def test_python_blocks_print_what_the_page_shows(service_url):
    pages.test_python_blocks_print_what_the_page_shows(PAGE, service_url)


def test_curl_blocks_get_the_reply_that_the_page_shows(service_url):
    pages.test_curl_blocks_get_the_reply_that_the_page_shows(PAGE, service_url)
