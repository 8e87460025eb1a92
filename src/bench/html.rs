//! Reports as one page that needs nothing else: tables, and plots that its own script draws.

use super::report::Report;

const PAGE: &str = include_str!("page.html");
const PLACE: &str = r#"id="data">{}<"#;

/// One page about all of them.
pub fn page(reports: &[Report]) -> String {
    let data = serde_json::to_string(reports).expect("a report is JSON");
    // Inside a script element only its end tag means anything.
    let data = data.replace("</", r"<\/").replace("<!--", r"<\u0021--");
    PAGE.replacen(PLACE, &format!(r#"id="data">{data}<"#), 1)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn a_page_holds_its_reports_and_no_name_ends_it_early() {
        let mut report = report(70);
        report.subject.model = "</script><script>alert(1)</script><!--".into();
        let page = page(&[report.clone(), report]);
        assert_eq!(page.matches("</script>").count(), PAGE.matches("</script>").count());
        let data = page.split_once(r#"id="data">"#).expect("the place").1.split_once("</script>").expect("its end").0;
        let read: Vec<Report> = serde_json::from_str(data).expect("it is JSON as it stands");
        assert!(read.len() == 2 && read[0].subject.model.starts_with("</script>"));
    }

    #[test]
    fn a_page_asks_for_nothing_outside() {
        for part in ["src=", "href=", "url(", "@import", "fetch("] {
            assert!(!PAGE.contains(part), "{part}");
        }
        assert!(PAGE.contains("default-src 'none'") && PAGE.contains(PLACE));
    }
}
