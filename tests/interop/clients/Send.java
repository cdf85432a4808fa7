// Sends the file MAIL_FILE as it is, by Jakarta Mail (Angus).
import jakarta.mail.Address;
import jakarta.mail.Session;
import jakarta.mail.Transport;
import jakarta.mail.internet.InternetAddress;
import jakarta.mail.internet.MimeMessage;
import java.io.FileInputStream;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Properties;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

public class Send {
    public static void main(String[] arguments) throws Exception {
        var environment = System.getenv();
        var store = KeyStore.getInstance(KeyStore.getDefaultType());
        store.load(null);
        try (var file = new FileInputStream(environment.get("MAIL_CA"))) {
            store.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(file));
        }
        var trust = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        trust.init(store);
        var tls = SSLContext.getInstance("TLS");
        tls.init(null, trust.getTrustManagers(), null);

        var implicit = environment.get("MAIL_TLS").equals("implicit");
        var protocol = implicit ? "smtps" : "smtp";
        var properties = new Properties();
        properties.put("mail." + protocol + ".ssl.socketFactory", tls.getSocketFactory());
        properties.put("mail." + protocol + ".ssl.checkserveridentity", "true");
        properties.put("mail." + protocol + ".starttls.enable", String.valueOf(!implicit));
        properties.put("mail." + protocol + ".starttls.required", String.valueOf(!implicit));
        properties.put("mail." + protocol + ".from", environment.get("MAIL_FROM"));
        properties.put("mail." + protocol + ".allow8bitmime", "true");
        var session = Session.getInstance(properties);
        MimeMessage message;
        try (var file = new FileInputStream(environment.get("MAIL_FILE"))) {
            message = new MimeMessage(session, file);
        }
        try (Transport transport = session.getTransport(protocol)) {
            transport.connect(
                environment.get("MAIL_HOST"),
                Integer.parseInt(environment.get("MAIL_PORT")),
                environment.get("MAIL_LOGIN"),
                environment.get("MAIL_PASSWORD"));
            transport.sendMessage(message, new Address[] {new InternetAddress(environment.get("MAIL_TO"))});
        }
    }
}
