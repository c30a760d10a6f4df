// The form answers as it is changed: the same page is asked for, its answer takes the old one's place, and the
// address follows, so that it can be shared.  Without this script the button does the same.
"use strict";
const form = document.querySelector("form");
const result = document.getElementById("result");
let latest = 0;
let asking = new AbortController();

async function ask(address, remember) {
  const mine = ++latest;
  asking.abort(); // nobody waits for the answer before: the server need not find it
  asking = new AbortController();
  result.setAttribute("aria-busy", "true");
  try {
    const page = await fetch(address, { headers: { Accept: "text/html" }, signal: asking.signal });
    const fresh = new DOMParser().parseFromString(await page.text(), "text/html");
    if (mine !== latest) return;
    result.innerHTML = fresh.getElementById("result").innerHTML;
    document.title = fresh.title;
    document.querySelector("h1").textContent = fresh.querySelector("h1").textContent;
    if (remember) history.pushState(null, "", address);
  } catch (error) {
    if (mine === latest) location.assign(address);
  } finally {
    if (mine === latest) result.removeAttribute("aria-busy");
  }
}

function address() {
  return "?" + new URLSearchParams(new FormData(form)).toString();
}

form.addEventListener("change", () => ask(address(), true));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask(address(), true);
});
window.addEventListener("popstate", () => location.reload());
