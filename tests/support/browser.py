"""Pages in a real browser: headless Chromium loads one, a script works on it and says what it found."""

import http.server
import json
import queue
import shutil
import subprocess
import threading

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The page stands unchanged, with its own policy, in frames as wide as a desk's screen and as a phone's; the script of
# the test is outside. What goes wrong in a frame is written down from before its first byte.
_FRAMES = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const sleep = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
const until = async condition => { while (!condition()) await sleep(0.05); };
const open = (page, width) => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  document.body.append(frame);
  const { contentDocument: inside, contentWindow: at } = frame;
  inside.open();
  at.complaints = [];
  const complain = text => at.complaints.push(String(text));
  at.addEventListener("error", e => complain(e.message));
  at.addEventListener("unhandledrejection", e => complain(e.reason));
  inside.addEventListener("securitypolicyviolation", e => complain(`${e.violatedDirective} ${e.blockedURI}`));
  at.console.error = at.console.warn = (...said) => complain(said.join(" "));
  at.saved = [];
  at.URL.createObjectURL = blob => { at.saved.push(blob); return "blob:none"; };
  at.URL.revokeObjectURL = () => {};
  at.HTMLAnchorElement.prototype.click = function () {
    if (this.download) at.saved.at(-1).filename = this.download;
    else this.dispatchEvent(new at.MouseEvent("click", { bubbles: true, cancelable: true }));
  };
  inside.write(page);
  inside.close();
  return at;
};
addEventListener("load", async () => {
  let found;
  try {
    const page = %s;
    const wide = open(page, 1280), phone = open(page, 360);
    found = await (async () => { %s })();
  } catch (error) {
    found = { thrown: `${error} ${error.stack}` };
  }
  await fetch("/", { method: "POST", body: JSON.stringify(found) });
});
</script>"""


def in_chromium(page, script, folder, seconds=300):
    """Return what an asynchronous JavaScript function returns that has the page's windows ``wide`` and ``phone``.

    A window has its ``complaints`` (errors, warnings, what its policy forbade) and the blobs that it ``saved``. The
    page finds the files of ``folder`` beside it. The script may wait by ``await until(() => condition)``.

    The browser runs in real time and sends the result to a server of this function when the script has ended. Under
    Chromium's virtual time the page was read when the budget was spent, and on a busy machine that came before the
    end of what doesn't count in virtual time: reading of blobs, drawing of pictures.
    """
    arrived = queue.Queue()

    class Exchange(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (_FRAMES % (json.dumps(page).replace("<", "\\u003c"), script)).encode()
            beside = folder / self.path[1:]
            if self.path != "/":
                body = beside.read_bytes() if beside.is_file() else b""
            self.send_response(200 if body else 404)
            self.send_header(
                "Content-Type", "text/javascript" if beside.suffix == ".js" else "text/html; charset=utf-8"
            )
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            arrived.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,2000",
        "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = json.loads(arrived.get(timeout=seconds))
    except queue.Empty:
        raise AssertionError(f"the script did not come to its end in {seconds} s") from None
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    assert "thrown" not in found, found["thrown"]
    return found
