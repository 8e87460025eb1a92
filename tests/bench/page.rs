//! The report's page in a browser, as `make setup-browser` unpacks one: wide and narrow, light and dark. Without it the test says so and
//! passes.

use std::path::Path;

use crate::browser::Browser;
use crate::program::{self, ends};

const T5: &str = "tests/bundles/t5";
const LIGHT: &str = "rgb(251, 251, 250)";
const DARK: &str = "rgb(22, 24, 26)";
/// What the page tells of itself once it is drawn.
const PROBE: &str = "<script>
  const wide = document.documentElement.scrollWidth > innerWidth;
  const paper = getComputedStyle(document.body).backgroundColor;
  document.body.dataset.seen = `${innerWidth} ${wide ? 'overflows' : 'fits'} ${paper}`;
</script>";
/// It must stand before what it listens to.
const LISTENER: &str =
    "<script>addEventListener('error', event => document.documentElement.dataset.fault = event.message);</script>";

/// A page about runs of these scenarios.
fn page(folder: &Path, scenarios: &[&[&str]]) -> String {
    let bench = |args: &[&str]| ends(&program::bench(args).output().unwrap(), 0);
    let reports: Vec<String> =
        (0..scenarios.len()).map(|i| folder.join(format!("{i}.json")).to_str().unwrap().to_owned()).collect();
    for (scenario, report) in scenarios.iter().zip(&reports) {
        let few = ["--model", T5, "--drawn", "4", "--image-size", "64x48", "--duration", "0", "--warm-up", "0", "--json", report];
        bench(&[*scenario, &few].concat());
    }
    let html = folder.join("page.html");
    bench(&[&["page"], &reports.iter().map(String::as_str).collect::<Vec<_>>()[..], &["--html", html.to_str().unwrap()]].concat());
    std::fs::read_to_string(html).unwrap()
}

/// What stands in the page after its script ran, in a window of this size.
fn drawn(browser: &Browser, folder: &Path, page: &str, [width, height]: [usize; 2], dark: bool) -> String {
    let file = folder.join("probed.html");
    std::fs::write(&file, page.replacen("<main", &format!("{LISTENER}<main"), 1) + PROBE).unwrap();
    let colours = dark.then(|| "--blink-settings=preferredColorScheme=0".to_owned());
    browser.drawn(folder, &file, &[[format!("--window-size={width},{height}")].as_slice(), colours.as_slice()].concat())
}

#[test]
fn a_page_opens_anywhere() {
    let Some(browser) = Browser::find() else { return };
    let folder = std::env::temp_dir().join(format!("blip2-page-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let server = |rate| ["server", "--rate", rate, "--queries", "6"];
    let page = page(&folder, &[&["single", "--queries", "6"], &server("20"), &server("50")]);
    // The namespace of SVG is a name and nothing that is fetched.
    assert!(!page.replace("http://www.w3.org/2000/svg", "").contains("://"), "it names an address");
    for (size, dark) in [([1280, 900], false), ([1280, 900], true), ([390, 844], false), ([390, 844], true)] {
        let found = drawn(&browser, &folder, &page, size, dark);
        let seen = format!("{} fits {}", size[0], if dark { DARK } else { LIGHT });
        assert!(found.contains(&format!("data-seen=\"{seen}\"")), "{size:?}: {}", &found[..400]);
        assert!(!found.contains("data-fault"), "{size:?}: {}", &found[..400]);
        for heading in ["Latency", "Where the time goes", "Latency against rate", "Timeline"] {
            assert!(found.contains(&format!("<h2>{heading}</h2><svg")), "{heading}");
        }
        assert!(!found.contains("NaN") && !found.contains("undefined"), "{size:?}");
        assert_eq!((found.matches("<h1>").count(), found.matches("<table>").count()), (3, 3));
    }
    std::fs::remove_dir_all(folder).unwrap();
}
