// Sends the file MAIL_FILE as it is, by net/smtp.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"log"
	"net/smtp"
	"os"
)

func main() {
	if err := send(); err != nil {
		log.Fatal(err)
	}
}

func send() error {
	authority, err := os.ReadFile(os.Getenv("MAIL_CA"))
	if err != nil {
		return err
	}
	text, err := os.ReadFile(os.Getenv("MAIL_FILE"))
	if err != nil {
		return err
	}
	host := os.Getenv("MAIL_HOST")
	address := host + ":" + os.Getenv("MAIL_PORT")
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	config := &tls.Config{RootCAs: roots, ServerName: host}

	var client *smtp.Client
	if os.Getenv("MAIL_TLS") == "implicit" {
		connection, err := tls.Dial("tcp", address, config)
		if err != nil {
			return err
		}
		if client, err = smtp.NewClient(connection, host); err != nil {
			return err
		}
	} else {
		if client, err = smtp.Dial(address); err != nil {
			return err
		}
		if err = client.StartTLS(config); err != nil {
			return err
		}
	}
	if err = client.Auth(smtp.PlainAuth("", os.Getenv("MAIL_LOGIN"), os.Getenv("MAIL_PASSWORD"), host)); err != nil {
		return err
	}
	if err = client.Mail(os.Getenv("MAIL_FROM")); err != nil {
		return err
	}
	if err = client.Rcpt(os.Getenv("MAIL_TO")); err != nil {
		return err
	}
	writer, err := client.Data()
	if err != nil {
		return err
	}
	if _, err = writer.Write(text); err != nil {
		return err
	}
	if err = writer.Close(); err != nil {
		return err
	}
	return client.Quit()
}
