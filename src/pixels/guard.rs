//! A panic inside one picture ends that picture only, and without a word on standard error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use super::PixelsError;

/// Runs what may panic on damaged data. Decoders are many, and not all of them are as careful as their data is wild.
pub fn contained<T>(work: impl FnOnce() -> Result<T, PixelsError>) -> Result<T, PixelsError> {
    silence_this_thread();
    let before = IS_SILENT.replace(true);
    // No state outlives the work but its result.
    let done = catch_unwind(AssertUnwindSafe(work));
    IS_SILENT.set(before);
    done.unwrap_or_else(|panic| Err(PixelsError::Damaged(reason(&*panic).into())))
}

thread_local! {
    static IS_SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Hooks are one for all threads, so this one hands on what other threads and other work report.
fn silence_this_thread() {
    static ONCE: Once = Once::new();
    // A hook cannot be set while the thread unwinds.
    if std::thread::panicking() {
        return;
    }
    ONCE.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !IS_SILENT.get() {
                report(panic);
            }
        }));
    });
}

fn reason(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "unreadable data".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_the_error_of_its_picture() {
        let text = contained::<()>(|| panic!("row {} is missing", 3)).expect_err("it panics");
        assert!(matches!(&text, PixelsError::Damaged(reason) if reason.to_string() == "row 3 is missing"), "{text:?}");
        let unwound = contained::<()>(|| std::panic::resume_unwind(Box::new(7))).expect_err("it unwinds");
        assert!(matches!(unwound, PixelsError::Damaged(_)));
        assert_eq!(contained(|| Ok(5)).expect("nothing happens"), 5);
        assert!(!IS_SILENT.get());
    }
}
