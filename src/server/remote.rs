//! Pictures behind https addresses: an address comes in, bytes go out.
//!
//! Whoever asks writes the address, so it must not make this machine speak to its own network. Only hosts that the configuration
//! names are spoken to. `Url` alone reads an address, and what is asked for is put together from the parts that were checked. A
//! name is looked up once, all that it leads to must be on the public internet, and the connection goes there and nowhere else.
//! Each redirect begins anew. Networks that reach IPv4 through NAT64 are not served: such addresses may lead inside.
//! What the bytes are is not known here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::num::NonZeroU16;
use std::str::FromStr;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ureq::http::header::LOCATION;
use ureq::http::{Response, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Connector, NextTimeout, RustlsConnector, TcpConnector};
use ureq::{Agent, Body};
use url::{Host, Position, Url};

const HTTPS_PORT: u16 = 443;
/// Of connecting, TLS included.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// Of the whole, from the first look-up to the last byte.
const PATIENCE: Duration = Duration::from_secs(15);
const MAX_REDIRECTS: usize = 3;
const MAX_HEADER_BYTES: usize = 16 << 10;
const USER_AGENT: &str = concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"));
/// What can be decoded, so that hosts that choose do not choose anything newer.
const ACCEPT: &str = "image/jpeg, image/png, image/webp, image/gif, image/bmp, image/tiff, */*;q=0.1";

/// Networks that are not the public internet: IANA's special-purpose registry, multicast, and what is kept for later.
const NOT_GLOBAL_V4: [(Ipv4Addr, u32); 16] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Azure's metadata, though the address looks public.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
/// All of IPv6 that is given out for use in public.
const GLOBAL_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
/// What of it is not: Teredo and its neighbours, documentation, 6to4, the 6bone of old.
const NOT_GLOBAL_V6: [(Ipv6Addr, u32); 5] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3ffe, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Fetches pictures from hosts that the configuration names.
pub struct Remote {
    allow: Vec<Allowed>,
    rules: Rules,
    agent: Agent,
}

/// Why a picture is not fetched. Clients are told, so nothing of the inside is in it.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum RemoteError {
    /// No URL.
    #[error("the address of the picture makes no sense")]
    Address,
    /// Another scheme.
    #[error("pictures are fetched over https alone")]
    Scheme,
    /// User information.
    #[error("the address of the picture holds a user name or a password")]
    User,
    /// A host that the configuration does not name, or an IP address.
    #[error("pictures are not fetched from this host")]
    Host,
    /// A port that the configuration does not name.
    #[error("pictures are not fetched from this port of the host")]
    Port,
    /// Unknown, or inside; which of the two is not told.
    #[error("the picture's host is not found on the public internet")]
    NotFound,
    /// No connection, no TLS, no HTTP, or an early end.
    #[error("the picture's host cannot be reached or breaks off")]
    Broken,
    /// A status other than 200.
    #[error("the picture's host answers with status {0}, not with 200")]
    Status(u16),
    /// A redirect to what would have been refused at once.
    #[error("the picture's host redirects to an address that is not allowed")]
    Redirect,
    /// One redirect after another.
    #[error("the picture's host redirects more than {MAX_REDIRECTS} times")]
    Redirects,
    /// More bytes than are taken.
    #[error("the picture has more than the {0} bytes allowed")]
    Large(u64),
    /// Not there in time.
    #[error("the picture does not come in time")]
    Slow,
}

/// An entry of the configuration that names no host.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no host; write images.example.org, *.example.org for all below, or images.example.org:8443")]
pub struct BadHost(String);

/// A host that pictures are fetched from, or all below it.
struct Allowed {
    is_below: bool,
    host: String,
    port: u16,
}

/// How far fetching goes. A server has [`Rules::PUBLIC`]; only tests have others.
#[derive(Clone, Copy, Debug)]
struct Rules {
    scheme: &'static str,
    look_up: LookUp,
    may_reach: fn(IpAddr) -> bool,
    patience: Duration,
}

/// Where a name leads; it may block for long.
type LookUp = fn(&str) -> io::Result<Vec<IpAddr>>;

/// An address that was checked: as redirects refer to it, and as it is asked for.
struct Target {
    url: Url,
    uri: Uri,
}

impl Remote {
    /// `allow`: `images.example.org`, or `*.example.org` for all below, and `:8443` after it for a port other than 443; with none,
    /// nothing is fetched. An error for an entry that is no host name.
    pub fn new(allow: &[String]) -> Result<Self, BadHost> {
        Self::with(allow, Rules::PUBLIC)
    }

    /// Whether anything may be fetched at all.
    pub fn is_on(&self) -> bool {
        !self.allow.is_empty()
    }

    /// The picture's bytes, at most `max_bytes` of them. It blocks, for 15 seconds at the most.
    pub fn fetch(&self, address: &str, max_bytes: u64) -> Result<Vec<u8>, RemoteError> {
        let deadline = Instant::now() + self.rules.patience;
        let mut target = self.target(address, None)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.ask(target.uri, deadline)?;
            target = match response.status().as_u16() {
                200 => return read(response.into_body(), max_bytes),
                301 | 302 | 303 | 307 | 308 => self.redirected(&target.url, &response)?,
                status => return Err(RemoteError::Status(status)),
            };
        }
        Err(RemoteError::Redirects)
    }

    fn with(allow: &[String], rules: Rules) -> Result<Self, BadHost> {
        let allow = allow.iter().map(|entry| entry.parse()).collect::<Result<_, _>>()?;
        Ok(Self { allow, rules, agent: rules.agent() })
    }

    /// What a text refers to, if it may be asked for.
    fn target(&self, text: &str, base: Option<&Url>) -> Result<Target, RemoteError> {
        // `Url` would read `\` as `/` and skip line breaks, where others read them otherwise.
        if text.contains(|char: char| char == '\\' || char.is_control() || char.is_whitespace()) {
            return Err(RemoteError::Address);
        }
        let url = Url::options().base_url(base).parse(text).map_err(|_| RemoteError::Address)?;
        let uri = self.checked(&url)?;
        Ok(Target { url, uri })
    }

    fn checked(&self, url: &Url) -> Result<Uri, RemoteError> {
        if url.scheme() != self.rules.scheme {
            return Err(RemoteError::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(RemoteError::User);
        }
        let Some(Host::Domain(name)) = url.host() else { return Err(RemoteError::Host) };
        let host = host_name(name).ok_or(RemoteError::Host)?;
        let port = url.port_or_known_default().ok_or(RemoteError::Port)?;
        self.check_host(host, port)?;
        let authority = if port == HTTPS_PORT { host.to_owned() } else { format!("{host}:{port}") };
        let path = &url[Position::BeforePath..Position::AfterQuery];
        let uri = Uri::builder().scheme(self.rules.scheme).authority(authority).path_and_query(path).build();
        uri.map_err(|_| RemoteError::Address)
    }

    fn check_host(&self, host: &str, port: u16) -> Result<(), RemoteError> {
        let mut ports = self.allow.iter().filter(|allowed| allowed.covers(host)).map(|allowed| allowed.port).peekable();
        if ports.peek().is_none() {
            return Err(RemoteError::Host);
        }
        if !ports.any(|allowed| allowed == port) {
            return Err(RemoteError::Port);
        }
        Ok(())
    }

    fn ask(&self, uri: Uri, deadline: Instant) -> Result<Response<Body>, RemoteError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.agent.get(uri).config().timeout_global(Some(left)).build().call().map_err(RemoteError::of)
    }

    fn redirected(&self, from: &Url, response: &Response<Body>) -> Result<Target, RemoteError> {
        let location = response.headers().get(LOCATION).and_then(|value| str::from_utf8(value.as_bytes()).ok());
        self.target(location.ok_or(RemoteError::Redirect)?, Some(from)).map_err(|_| RemoteError::Redirect)
    }
}

impl RemoteError {
    /// What a client is told of an error; the rest is for the log.
    fn of(error: ureq::Error) -> Self {
        tracing::debug!(%error, "a picture is not fetched");
        match error {
            ureq::Error::Timeout(_) => Self::Slow,
            ureq::Error::HostNotFound => Self::NotFound,
            ureq::Error::BodyExceedsLimit(limit) => Self::Large(limit),
            _ => Self::Broken,
        }
    }
}

impl Allowed {
    fn covers(&self, host: &str) -> bool {
        match host.strip_suffix(&*self.host) {
            Some("") => !self.is_below,
            Some(above) => self.is_below && above.ends_with('.'),
            None => false,
        }
    }
}

impl FromStr for Allowed {
    type Err = BadHost;

    fn from_str(entry: &str) -> Result<Self, BadHost> {
        let bad = || BadHost(entry.to_owned());
        let (is_below, rest) = entry.strip_prefix("*.").map_or((false, entry), |rest| (true, rest));
        let (host, port) = match rest.split_once(':') {
            Some((host, port)) => (host, port.parse().map(NonZeroU16::get).map_err(|_| bad())?),
            None => (rest, HTTPS_PORT),
        };
        let Ok(Host::Domain(name)) = Host::parse(host) else { return Err(bad()) };
        let host = host_name(&name).ok_or_else(bad)?.to_owned();
        Ok(Self { is_below, host, port })
    }
}

impl Rules {
    const PUBLIC: Self = Self { scheme: "https", look_up, may_reach: is_global, patience: PATIENCE };

    /// What speaks HTTP by these rules: it follows no redirect, keeps no connection, no cookie, and has no way to a proxy.
    fn agent(self) -> Agent {
        let config = Agent::config_builder()
            .https_only(self.scheme == "https")
            .proxy(None)
            .max_redirects(0)
            .http_status_as_error(false)
            .max_idle_connections(0)
            .max_response_header_size(MAX_HEADER_BYTES)
            .timeout_connect(Some(CONNECT_PATIENCE))
            .user_agent(USER_AGENT)
            .accept(ACCEPT)
            .accept_encoding("identity")
            .build();
        let connector = ().chain(TcpConnector::default()).chain(RustlsConnector::default());
        Agent::with_parts(config, connector, self)
    }
}

/// Every connection of the agent goes to what is found here.
impl Resolver for Rules {
    fn resolve(&self, uri: &Uri, _: &ureq::config::Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().ok_or(ureq::Error::HostNotFound)?;
        let port = uri.port_u16().unwrap_or(HTTPS_PORT);
        let found = within(timeout, self.look_up, host)?;
        if let Some(address) = found.iter().find(|address| !(self.may_reach)(**address)) {
            tracing::warn!(host, %address, "a picture is not fetched: its host is not on the public internet");
            return Err(ureq::Error::HostNotFound);
        }
        let mut addresses = self.empty();
        for address in found {
            // As many as there is room for.
            let _ = addresses.try_push(SocketAddr::new(address, port));
        }
        if addresses.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(addresses) }
    }
}

/// A look-up on a thread of its own, for it cannot be called off.
fn within(timeout: NextTimeout, look_up: LookUp, host: &str) -> Result<Vec<IpAddr>, ureq::Error> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let host = host.to_owned();
    thread::Builder::new().spawn(move || sender.send(look_up(&host)))?;
    match receiver.recv_timeout(*timeout.after) {
        Ok(found) => found.map_err(|_| ureq::Error::HostNotFound),
        Err(_) => Err(ureq::Error::Timeout(timeout.reason)),
    }
}

/// The dot at the end keeps the search domains of this machine's network out.
fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    let found = (format!("{host}."), HTTPS_PORT).to_socket_addrs()?;
    Ok(found.map(|address| address.ip()).collect())
}

fn read(body: Body, max_bytes: u64) -> Result<Vec<u8>, RemoteError> {
    if body.content_length().is_some_and(|length| length > max_bytes) {
        return Err(RemoteError::Large(max_bytes));
    }
    body.into_with_config().limit(max_bytes).read_to_vec().map_err(RemoteError::of)
}

/// A host's name without the dot at its end, unless it holds what no name does.
fn host_name(name: &str) -> Option<&str> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let is_label = |label: &str| (1..=63).contains(&label.len()) && label.bytes().all(is_plain);
    (name.len() <= 253 && name.split('.').all(is_label)).then_some(name)
}

/// Whether an address is one of the public internet.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_global_v4(address),
        IpAddr::V6(address) => is_global_v6(address),
    }
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    let is_in = |(network, length): &(Ipv4Addr, u32)| (address.to_bits() ^ network.to_bits()) >> (32 - length) == 0;
    !NOT_GLOBAL_V4.iter().any(is_in)
}

fn is_global_v6(address: Ipv6Addr) -> bool {
    // Mapped (`::ffff:1.2.3.4`) or compatible (`::1.2.3.4`), which `::` and `::1` are as well.
    if let Some(inner) = address.to_ipv4() {
        return is_global_v4(inner);
    }
    let is_in = |(network, length): &(Ipv6Addr, u32)| (address.to_bits() ^ network.to_bits()) >> (128 - length) == 0;
    is_in(&GLOBAL_V6) && !NOT_GLOBAL_V6.iter().any(is_in)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::Receiver;

    use super::*;

    const CAP: u64 = 1000;
    /// Of a test that is to run out of it.
    const SHORT: Duration = Duration::from_millis(400);
    /// Much longer than that, much shorter than what would be waited for.
    const SOON: Duration = Duration::from_secs(10);

    /// Everything below `test` is this machine, spoken to without TLS; what else there is, is inside.
    const LOCAL: Rules =
        Rules { scheme: "http", look_up: here, may_reach: |address| address.is_loopback(), patience: Duration::from_secs(20) };

    const GLOBAL: &str = "1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 \
        168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 \
        192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 \
        203.0.112.255 203.0.114.0 223.255.255.255 2000::1 2001:200::1 2001:db7:ffff::1 2001:db9::1 2003::1 2606:4700::1111 \
        2a00:1450::1 3ffd::1 3fff:1000::1 ::ffff:8.8.8.8 ::8.8.8.8";
    const NOT_GLOBAL: &str = "0.0.0.0 0.255.255.255 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 \
        127.255.255.255 168.63.129.16 169.254.0.1 169.254.169.254 169.254.255.255 172.16.0.1 172.31.255.255 192.0.0.8 \
        192.0.0.192 192.0.2.1 192.0.2.255 192.88.99.1 192.88.99.255 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 \
        198.51.100.1 198.51.100.255 203.0.113.1 203.0.113.255 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.254 \
        255.255.255.255 :: ::1 ::2 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 ::10.0.0.1 \
        ::ffff:0:8.8.8.8 64:ff9b::8.8.8.8 64:ff9b::10.0.0.1 64:ff9b:1::10.0.0.1 100::1 1fff::1 2001::1 2001:2::1 2001:10::1 \
        2001:20::1 2001:1ff::1 2001:db8::1 2001:db8:ffff::1 2002:a00:1:: 2002:808:808:: 2002:ffff::1 3ffe::1 3ffe:ffff::1 \
        3fff::1 3fff:fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 ff0e::1";
    const HOSTS: &str = "a.org A.ORG a.org. *.a.org a.org:8443 *.a.org:8443 bücher.example a-b_c.org localhost";
    const NO_HOSTS: &str = "* *. **.a.org *.*.a.org a.*.org *a.org .a.org a..org a.org.. a.org: a.org:0 a.org:65536 a.org:x \
        a.org:1:2 https://a.org a.org/ a.org/x u@a.org a,b.org 127.0.0.1 127.1 0x7f.1 2130706433 *.1 [::1] ::1 [::1]:443 \
        １２７.0.0.1";
    /// Where `allowed.org`, `*.example.org` and `ports.org:8443` are allowed.
    const REFUSED: [(RemoteError, &str); 5] = [
        (
            RemoteError::Address,
            "allowed.org /a.png //allowed.org/a.png https:// https:/// https://allowed.org\\@evil.org \
            https:\\\\allowed.org\\a.png https://evil.org\\@allowed.org https://allowed.org:65536/ https://allowed.org:x/ \
            https://allowed.org%00.evil.org/ https://[::1/ https://1.2.3.4.5/ https://allowed.org%0d%0a/",
        ),
        (
            RemoteError::Scheme,
            "http://allowed.org/ ftp://allowed.org/ file:///etc/passwd file://allowed.org/a gopher://allowed.org/ \
            javascript:alert(1) data:image/png;base64,AAAA blob:https://allowed.org/a wss://allowed.org/ \
            httpss://allowed.org/ localhost:80",
        ),
        (
            RemoteError::User,
            "https://u@allowed.org/ https://u:p@allowed.org/ https://:p@allowed.org/ https://allowed.org@evil.org/ \
            https://allowed.org:443@evil.org/ https://evil.org@allowed.org/ https://a@b@allowed.org/",
        ),
        (
            RemoteError::Host,
            "https://evil.org/ https://evil.org#@allowed.org https://evil.org?@allowed.org https://evil.org/@allowed.org \
            https://example.org/ https://evilexample.org/ https://a.example.org.evil.org/ https://allowed.org.evil.org/ \
            https://evilallowed.org/ https://a.allowed.org/ https://allowed.org../ https://.allowed.org/ \
            https://.example.org/ https://a..example.org/ https://a;b.example.org/ https://a,b.example.org/ https://allowed/ \
            https://localhost/ https://127.0.0.1/ https://127.0.0.1./ https://127.1/ https://2130706433/ https://0x7f000001/ \
            https://0x7f.1/ https://0177.0.0.1/ https://017700000001/ https://１２７.0.0.1/ https://127。0。0。1/ \
            https://%31%32%37.0.0.1/ https://8.8.8.8/ https://[::1]/ https://[::ffff:127.0.0.1]/ https://[::ffff:7f00:1]/ \
            https://[64:ff9b::7f00:1]/ https://[2606:4700::1111]/",
        ),
        (
            RemoteError::Port,
            "https://allowed.org:80/ https://allowed.org:8443/ https://allowed.org:22/ https://allowed.org:0/ \
            https://a.example.org:8443/ https://ports.org/ https://ports.org:443/ https://ports.org:8444/",
        ),
    ];

    fn here(host: &str) -> io::Result<Vec<IpAddr>> {
        Ok(vec![if host.starts_with("inside.") { [10, 0, 0, 1].into() } else { Ipv4Addr::LOCALHOST.into() }])
    }

    fn remote(allow: &[&str], rules: Rules) -> Remote {
        Remote::with(&allow.iter().map(ToString::to_string).collect::<Vec<_>>(), rules).unwrap()
    }

    /// A server on this machine: `answer` gets the first line of each request. The requests' heads come out.
    fn serve(answer: impl Fn(&str, &mut TcpStream) -> io::Result<()> + Send + 'static) -> (u16, Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, heads) = mpsc::channel();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let head: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
                let first = head.first().cloned().unwrap_or_default();
                let _ = sender.send(head.join("\n"));
                // Whoever asked may have gone.
                let _ = answer(&first, &mut stream);
            }
        });
        (port, heads)
    }

    /// Fetches from a server that says the same each time.
    fn from(answer: &'static [u8]) -> Result<Vec<u8>, RemoteError> {
        from_slow(move |stream| stream.write_all(answer), LOCAL)
    }

    fn from_slow(answer: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static, rules: Rules) -> Result<Vec<u8>, RemoteError> {
        let (port, _heads) = serve(move |_, stream| answer(stream));
        let address = format!("{}://a.test:{port}/", rules.scheme);
        remote(&[&format!("a.test:{port}")], rules).fetch(&address, CAP)
    }

    /// One byte after another, without an end.
    fn drip(stream: &mut TcpStream, head: &str) -> io::Result<()> {
        stream.write_all(head.as_bytes())?;
        loop {
            stream.write_all(b"x")?;
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn redirect(stream: &mut TcpStream, to: &str) -> io::Result<()> {
        write!(stream, "HTTP/1.1 302 Found\r\nLocation: {to}\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n")
    }

    fn picture(stream: &mut TcpStream) -> io::Result<()> {
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture")
    }

    #[test]
    fn addresses_inside_are_told_from_public_ones() {
        for (addresses, expected) in [(GLOBAL, true), (NOT_GLOBAL, false)] {
            for address in addresses.split_whitespace() {
                assert_eq!(is_global(address.parse().unwrap()), expected, "{address}");
            }
        }
    }

    #[test]
    fn only_host_names_can_be_allowed() {
        for entry in HOSTS.split_whitespace() {
            assert!(entry.parse::<Allowed>().is_ok(), "{entry}");
        }
        for entry in NO_HOSTS.split_whitespace().chain(["", " ", "a b.org", " a.org", "a.org\n"]) {
            assert!(entry.parse::<Allowed>().is_err(), "{entry}");
        }
        let told = Remote::new(&["a.org".into(), "https://b.org".into()]).err().unwrap().to_string();
        assert!(told.contains("`https://b.org`"), "{told}");
    }

    #[test]
    fn what_may_be_asked_for_is_asked_for_as_it_was_checked() {
        let remote = remote(&["allowed.org", "*.example.org", "ports.org:8443", "bücher.example"], Rules::PUBLIC);
        for (address, asked) in [
            ("https://allowed.org", "https://allowed.org/"),
            ("HTTPS://ALLOWED.org:443/A.png", "https://allowed.org/A.png"),
            ("https://allowed.org./a.png", "https://allowed.org/a.png"),
            ("https://allowed%2eorg/a.png", "https://allowed.org/a.png"),
            ("https://ａllowed.org/a.png", "https://allowed.org/a.png"),
            ("https://allowed.org/a/../b%20c%2F.png?x=1&y=%26|é#z", "https://allowed.org/b%20c%2F.png?x=1&y=%26|%C3%A9"),
            ("https://allowed.org/@evil.org", "https://allowed.org/@evil.org"),
            ("https://allowed.org/?u=https://u:p@evil.org", "https://allowed.org/?u=https://u:p@evil.org"),
            ("https://allowed.org?@evil.org/", "https://allowed.org/?@evil.org/"),
            ("https://a.example.org/", "https://a.example.org/"),
            ("https://a.b_1.example.org/", "https://a.b_1.example.org/"),
            ("https://ports.org:8443/", "https://ports.org:8443/"),
            ("https://BÜCHER.example/", "https://xn--bcher-kva.example/"),
            ("https://xn--bcher-kva.example/", "https://xn--bcher-kva.example/"),
        ] {
            let found = remote.target(address, None).map(|target| target.uri.to_string());
            assert_eq!(found.as_deref(), Ok(asked), "{address}");
        }
    }

    #[test]
    fn what_may_not_be_asked_for_is_refused_before_any_look_up() {
        let rules = Rules { look_up: |host| panic!("{host} is looked up"), ..Rules::PUBLIC };
        let remote = remote(&["allowed.org", "*.example.org", "ports.org:8443"], rules);
        for (error, addresses) in REFUSED {
            for address in addresses.split_whitespace() {
                assert_eq!(remote.fetch(address, CAP).as_ref(), Err(&error), "{address}");
            }
        }
        for gap in ["\n", "\r", "\t", "\0", " ", "\u{7f}", "\u{3000}"] {
            for address in
                [format!("{gap}https://allowed.org/"), format!("https://allowed.org/a{gap}b"), format!("https://allowed.org{gap}")]
            {
                assert_eq!(remote.fetch(&address, CAP), Err(RemoteError::Address), "{address:?}");
            }
        }
        assert_eq!(remote.fetch("", CAP), Err(RemoteError::Address));
    }

    #[test]
    fn nothing_is_fetched_where_no_host_is_named() {
        let remote = Remote::new(&[]).unwrap();
        assert!(!remote.is_on());
        assert_eq!(remote.fetch("https://example.org/", CAP), Err(RemoteError::Host));
        assert!(Remote::new(&["example.org".into()]).unwrap().is_on());
    }

    #[test]
    fn fetches_what_is_allowed() {
        let (port, heads) = serve(|_, stream| picture(stream));
        let remote = remote(&[&format!("*.test:{port}")], LOCAL);
        let found = remote.fetch(&format!("http://A.test.:{port}/a%20b.png?x=%2F#y"), CAP);
        assert_eq!(found.as_deref(), Ok(&b"picture"[..]));
        let head = heads.recv().unwrap().to_ascii_lowercase();
        assert!(head.starts_with("get /a%20b.png?x=%2f http/1.1\n"), "{head}");
        for (line, is_there) in [
            (format!("\nhost: a.test:{port}"), true),
            ("\naccept-encoding: identity".into(), true),
            (format!("\nuser-agent: {USER_AGENT}"), true),
            ("\nreferer".into(), false),
            ("\nauthorization".into(), false),
        ] {
            assert_eq!(head.contains(&line), is_there, "{line:?} in {head}");
        }
    }

    /// Which only a process of its own can have in its environment.
    #[test]
    fn proxies_of_the_environment_are_not_asked() {
        let (_, path) = concat!(module_path!(), "::fetches_what_is_allowed").split_once("::").unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        for name in ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy"] {
            command.env(name, "http://127.0.0.1:9");
        }
        let output = command.env_remove("NO_PROXY").env_remove("no_proxy").args(["--exact", path]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    fn a_name_that_leads_inside_is_refused() {
        let inside: [LookUp; 6] = [
            |_| Ok(vec![[10, 0, 0, 1].into()]),
            |_| Ok(vec![[127, 0, 0, 1].into()]),
            |_| Ok(vec![[169, 254, 169, 254].into()]),
            |_| Ok(vec![Ipv6Addr::LOCALHOST.into()]),
            |_| Ok(vec![]),
            |_| Err(io::ErrorKind::NotFound.into()),
        ];
        for (place, look_up) in inside.into_iter().enumerate() {
            let remote = remote(&["a.org"], Rules { look_up, ..Rules::PUBLIC });
            assert_eq!(remote.fetch("https://a.org/", CAP), Err(RemoteError::NotFound), "{place}");
        }
    }

    #[test]
    fn one_address_inside_is_enough_to_refuse_a_name() {
        let (port, heads) = serve(|_, stream| picture(stream));
        for look_up in [
            (|_| Ok(vec![[127, 0, 0, 1].into(), [10, 0, 0, 1].into()])) as LookUp,
            |_| Ok(vec![[10, 0, 0, 1].into(), [127, 0, 0, 1].into()]),
            |_| Ok([[127, 0, 0, 1].into()].repeat(20).into_iter().chain([[10, 0, 0, 1].into()]).collect()),
        ] {
            let remote = remote(&[&format!("a.test:{port}")], Rules { look_up, ..LOCAL });
            assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP), Err(RemoteError::NotFound));
        }
        assert_eq!(heads.try_iter().count(), 0);
    }

    #[test]
    fn a_name_is_looked_up_once_and_more_addresses_than_there_is_room_for_are_no_harm() {
        static N_LOOK_UPS: AtomicUsize = AtomicUsize::new(0);
        let look_up = |_: &str| match N_LOOK_UPS.fetch_add(1, Ordering::SeqCst) {
            0 => Ok([Ipv4Addr::LOCALHOST.into()].repeat(20)),
            _ => Ok(vec![[10, 0, 0, 1].into()]),
        };
        let (port, _heads) = serve(|_, stream| picture(stream));
        let remote = remote(&[&format!("a.test:{port}")], Rules { look_up, ..LOCAL });
        assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP).as_deref(), Ok(&b"picture"[..]));
        assert_eq!(N_LOOK_UPS.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn no_connection_is_used_again() {
        let (port, _heads) = serve(|_, stream| {
            // It stays open, but nobody listens.
            std::mem::forget(stream.try_clone()?);
            picture(stream)
        });
        let remote = remote(&[&format!("a.test:{port}")], LOCAL);
        for _ in 0..2 {
            assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP).as_deref(), Ok(&b"picture"[..]));
        }
    }

    #[test]
    fn redirects_are_followed_from_one_allowed_address_to_another() {
        let (port, heads) = serve(|first, stream| match first.split(' ').nth(1) {
            Some("/a/1") => redirect(stream, "2?x"),
            Some("/a/2?x") => redirect(stream, &format!("//b.test:{}/3", stream.local_addr()?.port())),
            Some("/3") => redirect(stream, "/4"),
            _ => picture(stream),
        });
        let remote = remote(&[&format!("*.test:{port}")], LOCAL);
        assert_eq!(remote.fetch(&format!("http://a.test:{port}/a/1"), CAP).as_deref(), Ok(&b"picture"[..]));
        let heads: Vec<_> = heads.try_iter().map(|head| head.to_ascii_lowercase()).collect();
        assert_eq!(heads.len(), 4);
        assert!(heads[3].starts_with("get /4 ") && heads[3].contains(&format!("\nhost: b.test:{port}")), "{heads:?}");
        assert!(heads.iter().all(|head| !head.contains("cookie") && !head.contains("referer")), "{heads:?}");
    }

    #[test]
    fn redirects_to_what_is_not_allowed_are_refused() {
        let (other, others) = serve(|_, stream| picture(stream));
        for (to, error) in [
            (format!("http://a.test:{other}/"), RemoteError::Redirect),
            ("http://evil.org/".into(), RemoteError::Redirect),
            ("https://a.test/".into(), RemoteError::Redirect),
            ("file:///etc/passwd".into(), RemoteError::Redirect),
            ("//127.0.0.1/".into(), RemoteError::Redirect),
            ("//u:p@PLACE/".into(), RemoteError::Redirect),
            ("\\\\PLACE/".into(), RemoteError::Redirect),
            ("//inside.PLACE/".into(), RemoteError::NotFound),
        ] {
            let (port, _heads) = serve(move |first, stream| match first.contains(" / ") {
                true => redirect(stream, &to.replace("PLACE", &format!("a.test:{}", stream.local_addr()?.port()))),
                false => picture(stream),
            });
            let remote = remote(&[&format!("*.test:{port}")], LOCAL);
            assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP), Err(error));
        }
        assert_eq!(others.try_iter().count(), 0);
        assert_eq!(from(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n"), Err(RemoteError::Redirect));
        assert_eq!(from(b"HTTP/1.1 302 Found\r\nLocation: /\xff\r\nContent-Length: 0\r\n\r\n"), Err(RemoteError::Redirect));
    }

    #[test]
    fn a_loop_of_redirects_ends() {
        let (port, heads) = serve(|_, stream| redirect(stream, "/"));
        let remote = remote(&[&format!("a.test:{port}")], LOCAL);
        assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP), Err(RemoteError::Redirects));
        assert_eq!(heads.try_iter().count(), MAX_REDIRECTS + 1);
    }

    #[test]
    fn only_status_200_has_a_picture() {
        for (answer, status) in [
            (&b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"[..], 404),
            (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", 500),
            (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\nno", 206),
            (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
            (b"HTTP/1.1 300 Choose\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n", 300),
            (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101),
        ] {
            assert_eq!(from(answer), Err(RemoteError::Status(status)));
        }
        assert_eq!(from(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").as_deref(), Ok(&b"ok"[..]));
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for answer in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\nshort\r\n0\r\n\r\n",
            b"SSH-2.0-OpenSSH_9.6\r\n",
        ] {
            assert_eq!(from(answer), Err(RemoteError::Broken), "{}", String::from_utf8_lossy(answer));
        }
        let wordy = |stream: &mut TcpStream| {
            write!(stream, "HTTP/1.1 200 OK\r\na: {}\r\nContent-Length: 2\r\n\r\nok", "a".repeat(MAX_HEADER_BYTES))
        };
        assert_eq!(from_slow(wordy, LOCAL), Err(RemoteError::Broken));
        let endless = |stream: &mut TcpStream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
            loop {
                stream.write_all(b"a: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n")?;
            }
        };
        assert_eq!(from_slow(endless, LOCAL), Err(RemoteError::Broken));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let remote = remote(&[&format!("a.test:{port}")], LOCAL);
        assert_eq!(remote.fetch(&format!("http://a.test:{port}/"), CAP), Err(RemoteError::Broken));
    }

    #[test]
    fn a_picture_has_at_most_as_many_bytes_as_are_taken() {
        for (head, n, is_taken) in [
            ("Content-Length: 1000", 1000, true),
            ("Content-Length: 1001", 1001, false),
            ("Connection: close", 1000, true),
            ("Connection: close", 1001, false),
            // Chunks hold, whatever the length says.
            ("Content-Length: 7\r\nTransfer-Encoding: chunked", 1001, false),
            // What comes after the length is no part of the picture.
            ("Content-Length: 1000", 2000, true),
        ] {
            let answer = move |stream: &mut TcpStream| {
                write!(stream, "HTTP/1.1 200 OK\r\n{head}\r\n\r\n")?;
                match head.contains("chunked") {
                    true => (0..n).try_for_each(|_| stream.write_all(b"1\r\nx\r\n")).and_then(|()| stream.write_all(b"0\r\n\r\n")),
                    false => stream.write_all(&vec![b'x'; n]),
                }
            };
            let found = from_slow(answer, LOCAL).map(|bytes| bytes.len() as u64);
            assert_eq!(found, if is_taken { Ok(CAP) } else { Err(RemoteError::Large(CAP)) }, "{head}, {n}");
        }
    }

    #[test]
    fn a_body_without_an_end_is_not_read_to_it() {
        let answer = |stream: &mut TcpStream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            loop {
                stream.write_all(&[b'x'; 1 << 16])?;
            }
        };
        assert_eq!(from_slow(answer, LOCAL), Err(RemoteError::Large(CAP)));
    }

    #[test]
    fn a_length_that_is_too_much_is_refused_before_the_body_comes() {
        let answer = |stream: &mut TcpStream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n")?;
            thread::sleep(SOON);
            Ok(())
        };
        assert_eq!(from_slow(answer, Rules { patience: SOON / 2, ..LOCAL }), Err(RemoteError::Large(CAP)));
    }

    #[test]
    fn what_is_packed_stays_packed() {
        let packed = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 3, 0x4b, 4, 0, 0x43, 0xbe, 0xb7, 0xe8, 1, 0, 0, 0];
        let answer = move |stream: &mut TcpStream| {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {}\r\n\r\n", packed.len())?;
            stream.write_all(&packed)
        };
        assert_eq!(from_slow(answer, LOCAL).as_deref(), Ok(&packed[..]));
    }

    #[test]
    fn whoever_takes_too_long_is_not_waited_for() {
        let rules = Rules { patience: SHORT, ..LOCAL };
        let silent = |_: &mut TcpStream| {
            thread::sleep(SOON);
            Ok(())
        };
        let start = Instant::now();
        assert_eq!(from_slow(|stream| drip(stream, "HTTP/1.1 200 OK\r\n\r\n"), rules), Err(RemoteError::Slow));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n";
        assert_eq!(from_slow(|stream| drip(stream, chunked), rules), Err(RemoteError::Slow));
        assert_eq!(from_slow(|stream| drip(stream, "HTTP/1.1 200 OK\r\na: "), rules), Err(RemoteError::Slow));
        assert_eq!(from_slow(silent, rules), Err(RemoteError::Slow));
        let look_up = |_: &str| {
            thread::sleep(SOON);
            here("")
        };
        assert_eq!(from_slow(picture, Rules { look_up, ..rules }), Err(RemoteError::Slow));
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    }

    #[test]
    fn redirects_have_no_time_of_their_own() {
        let answer = |stream: &mut TcpStream| {
            thread::sleep(SHORT / 3);
            redirect(stream, "/")
        };
        assert_eq!(from_slow(answer, Rules { patience: SHORT, ..LOCAL }), Err(RemoteError::Slow));
    }

    #[test]
    fn https_speaks_tls_to_the_host_that_was_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let hello = thread::spawn(move || {
            let mut hello = [0; 4096];
            let n = io::Read::read(&mut listener.accept().unwrap().0, &mut hello).unwrap();
            hello[..n].to_vec()
        });
        let remote = remote(&[&format!("a.test:{port}")], Rules { scheme: "https", ..LOCAL });
        assert_eq!(remote.fetch(&format!("https://a.test:{port}/"), CAP), Err(RemoteError::Broken));
        let hello = hello.join().unwrap();
        assert!(hello.starts_with(&[0x16, 3]), "{hello:?} is no handshake");
        assert!(hello.windows(6).any(|window| window == b"a.test"), "{hello:?} names no host");
    }
}
